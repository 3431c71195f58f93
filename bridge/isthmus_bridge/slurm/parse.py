"""Reads what Slurm's programs print in the delimited formats that :mod:`.cli` asks for. Pure, and strict.

A row that is not understood raises: half an answer must not look like the absence of a job.

A job's name may hold any character, line breaks too: whoever knew what separates the fields could have a job of theirs
pass for another's, or spoil the whole answer. So that is another string each time, and nothing else is split at.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence

from .model import SlurmError, TaskRecord
from .states import normal

# Widths are given where a default would cut off; without a number a field is as wide as its content.
SQUEUE_FIELDS = (
    "JobID", "ArrayJobID", "ArrayTaskID", "Name", "State", "exit_code", "RestartCnt", "StartTime", "EndTime",
    "SubmitTime", "NodeList", "UserID", "Reason", "WorkDir",
)  # fmt: skip
# A job's name decides whether a pool exists: never let ours be cut. They are up to 71 characters long.
NAME_WIDTH = 128
SACCT_FIELDS = ("JobID", "JobIDRaw", "JobName", "State", "ExitCode", "NodeList", "Submit", "Start", "Reason", "UID")
SACCT_FORMAT = ",".join(SACCT_FIELDS)

_NAMES = frozenset({"Name", "JobName", "WorkDir"})
_NOTHING = frozenset({"", "N/A", "n/a", "(null)", "None", "None assigned", "Unknown"})
_MAX_INDEX = 4_000_001  # Slurm's own bound of MaxArraySize
_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7})(?::(\d{1,7}))?)?")
_SACCT_ID = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^\]]*)\]))?")


def new_separator() -> str:
    """What ends each field of one answer. No digit comes first: squeue would take it for the field's width."""
    return "\x1f" + secrets.token_urlsafe(9)


def squeue_format(separator: str) -> str:
    """For ``squeue -O``: each field, and the separator."""
    return ",".join(f"{field}:{NAME_WIDTH if field == 'Name' else ''}{separator}" for field in SQUEUE_FIELDS)


def squeue(text: str, separator: str, owners: Mapping[int, str]) -> list[TaskRecord]:
    """Rows of ``squeue -O`` of these users. Raises :class:`SlurmError`.

    ``owners``: what the users are called in the records, by uid.
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
                # N/A where the job is no array.
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
    """Rows of ``sacct -p`` of these job names and this user. Raises :class:`SlurmError`.

    ``user``: what that one is called in the records.
    """
    records = []
    for row in _rows(text, separator, SACCT_FIELDS):
        shown, raw, name, state, status, node, submitted, start, reason, owner = row
        # `sacct -c` knows no filter: other users' jobs, and their imitations of our names, are in its answer.
        if name not in names or owner != str(uid):
            continue
        match = _SACCT_ID.fullmatch(shown)
        if match is None:
            raise SlurmError(f"sacct: {shown!r} is no job id")
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
    """Task indices: ``3``, ``0-9``, ``0,4-8:2%3``; None for ``N/A``. Raises :class:`SlurmError`."""
    if expression in _NOTHING:
        return None
    indices: list[int] = []
    for part in expression.partition("%")[0].strip("[]").split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise SlurmError(f"{expression[:80]!r} is no list of task indices")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        step = int(match[3]) if match[3] else 1
        if last > _MAX_INDEX or step < 1:
            raise SlurmError(f"{expression[:80]!r} is no list of task indices")
        indices.extend(range(first, last + 1, step))
    return tuple(indices)


def exit_status(text: str) -> tuple[int, int]:
    """Exit code and signal from squeue's wait status (``1280``) or from ``5:0``. Raises :class:`SlurmError`."""
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
        raise SlurmError(f"an answer that is not rows of {len(fields)} fields; it ends: {text[-120:]!r}")
    for start in range(0, len(cells), len(fields)):
        row = cells[start : start + len(fields)]
        # Each row is a line of its own. What was said before it is no field.
        if (start and not row[0].startswith("\n")) or len(row[0].split()) != 1:
            raise SlurmError(f"a row that begins with {row[0][:120]!r}")
        # Names stay as they are: one that only looks like ours is none of ours.
        yield [cell if field in _NAMES else cell.strip() for field, cell in zip(fields, row, strict=True)]


def _number(text: str) -> int:
    if not text.isdecimal():
        raise SlurmError(f"{text[:40]!r} is no number")
    return int(text)


def _time(text: str) -> float:
    # SLURM_TIME_FORMAT=%s makes it seconds since the epoch; words stand for unknown.
    return float(text) if text.isdecimal() else 0.0
