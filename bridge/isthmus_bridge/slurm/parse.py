"""Strict parser of the delimited output that :mod:`.cli` requests from Slurm's programs. Without side effects.

A malformed row raises an error: an incomplete answer must not look like the absence of a job.

A job's name may contain any character, even line breaks. A user who knew the separator could forge the record of
another job, or make the whole answer unreadable. Therefore each query has a new random separator, and nothing else
separates fields.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence

from isthmus_contracts.slurm_states import normal

from .model import SlurmError, TaskRecord

# A field without a width is as wide as its content.
SQUEUE_FIELDS = (
    "JobID", "ArrayJobID", "ArrayTaskID", "Name", "State", "exit_code", "RestartCnt", "StartTime", "EndTime",
    "SubmitTime", "NodeList", "UserID", "Reason", "WorkDir",
)  # fmt: skip
# Names identify pools, so they must not be truncated. Those of the bridge have up to 71 characters.
NAME_WIDTH = 128
SACCT_FIELDS = ("JobID", "JobIDRaw", "JobName", "State", "ExitCode", "NodeList", "Submit", "Start", "Reason", "UID")
SACCT_FORMAT = ",".join(SACCT_FIELDS)

_NAMES = frozenset({"Name", "JobName", "WorkDir"})
_NOTHING = frozenset({"", "N/A", "n/a", "(null)", "None", "None assigned", "Unknown"})
_MAX_INDEX = 4_000_001  # Slurm's limit of MaxArraySize
_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7}))?)?")
_SACCT_ID = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^\]]*)\]))?")


def new_separator() -> str:
    """Return a random separator. It does not begin with a digit, which squeue would take for the field's width."""
    return "\x1f" + secrets.token_urlsafe(9)


def squeue_format(separator: str) -> str:
    """Return the format for ``squeue -O``: each field followed by the separator."""
    return ",".join(f"{field}:{NAME_WIDTH if field == 'Name' else ''}{separator}" for field in SQUEUE_FIELDS)


def squeue(text: str, separator: str, owners: Mapping[int, str]) -> list[TaskRecord]:
    """Parse the output of ``squeue -O``, and return the records of these users. Raises :class:`SlurmError`.

    ``owners``: names of the users in the records, by uid.
    """
    records = []
    for row in _rows(text, separator, SQUEUE_FIELDS):
        job, array, indices, padded, state, status, restarts, start, end, submitted, node, uid, reason, place = row
        if _number(uid) not in owners:
            continue
        code, signal = exit_status(status)
        records.append(
            TaskRecord(
                job_id=_number(job),
                # N/A if the job is not an array.
                array_id=_number(job if array in _NOTHING else array),
                name=padded.rstrip(" "),
                indices=expand(indices),
                state=normal(state),
                reason="" if reason in _NOTHING else reason,
                exit_code=code,
                signal=signal,
                restarts=_number(restarts),
                start=_time(start),
                submitted=_time(submitted),
                node="" if node in _NOTHING else node,
                ends=_time(end) if normal(state) == "RUNNING" else 0.0,
                user=owners[_number(uid)],
                directory="" if place in _NOTHING else place,
            )
        )
    return records


def sacct(text: str, separator: str, names: frozenset[str], uid: int, user: str = "") -> list[TaskRecord]:
    """Parse the output of ``sacct -p``, and return this user's records with these names. Raises :class:`SlurmError`.

    ``user``: the name of the user in the records.
    """
    records = []
    for row in _rows(text, separator, SACCT_FIELDS):
        shown, raw, name, state, status, node, submitted, start, reason, owner = row
        # `sacct -c` has no filters: its answer includes jobs of other users, perhaps with forged names.
        if name not in names or owner != str(uid):
            continue
        match = _SACCT_ID.fullmatch(shown)
        if match is None:
            raise SlurmError(f"sacct: {shown!r} is not a job id")
        array, index, several = match.groups()
        code, signal = exit_status(status)
        records.append(
            TaskRecord(
                job_id=_number(raw.partition("_")[0]),
                array_id=int(array),
                name=name,
                indices=(int(index),) if index else expand(several) if several else None,
                state=normal(state),
                reason="" if reason in _NOTHING else reason,
                exit_code=code,
                signal=signal,
                start=_time(start),
                submitted=_time(submitted),
                node="" if node in _NOTHING else node,
                user=user,
            )
        )
    return records


def expand(expression: str) -> tuple[int, ...] | None:
    """Parse task indices: ``3``, ``0-9``, ``0,4-8:2%3``; return ``None`` for ``N/A``. Raises :class:`SlurmError`."""
    if expression in _NOTHING:
        return None
    indices: list[int] = []
    for part in expression.partition("%")[0].strip("[]").split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise SlurmError(f"{expression[:80]!r} is not a list of task indices")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        step = int(match[3]) if match[3] else 1
        if last > _MAX_INDEX or step < 1:
            raise SlurmError(f"{expression[:80]!r} is not a list of task indices")
        indices.extend(range(first, last + 1, step))
    return tuple(indices)


def exit_status(text: str) -> tuple[int, int]:
    """Return exit code and signal from a wait status (``1280``) or from ``5:0``. Raises :class:`SlurmError`."""
    if text in _NOTHING:
        return 0, 0
    code, colon, signal = text.partition(":")
    if colon:
        return _number(code), _number(signal)
    status = _number(code)
    return (status >> 8) & 0xFF, status & 0x7F


def _rows(text: str, separator: str, fields: Sequence[str]) -> Iterator[list[str]]:
    *cells, rest = text.split(separator)
    if rest.strip() or len(cells) % len(fields):
        raise SlurmError(f"the answer does not consist of rows of {len(fields)} fields; it ends: {text[-120:]!r}")
    for start in range(0, len(cells), len(fields)):
        row = cells[start : start + len(fields)]
        # Each row is a line of its own. Other output before it is not part of a field.
        if (start and not row[0].startswith("\n")) or len(row[0].split()) != 1:
            raise SlurmError(f"malformed row; it begins: {row[0][:120]!r}")
        # Names are not stripped: a name that differs by blanks is another name.
        yield [cell if field in _NAMES else cell.strip() for field, cell in zip(fields, row, strict=True)]


def _number(text: str) -> int:
    if not text.isdecimal():
        raise SlurmError(f"{text[:40]!r} is not a number")
    return int(text)


def _time(text: str) -> float:
    # SLURM_TIME_FORMAT=%s gives seconds since the epoch; words mean that the time is unknown.
    return float(text) if text.isdecimal() else 0.0
