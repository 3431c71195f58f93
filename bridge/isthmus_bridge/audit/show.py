"""The `audit` command: the log as a table or as JSON lines, and the check of its chain."""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .chain import GENESIS, Verdict, parse, verify

_HEADS = ("TIME", "EVENT", "JOB", "CLIENT", "DETAILS")
_WIDTHS = (24, 9, 24, 12, 0)
_LONGEST = 200
# Fields with columns of their own, or that the table leaves out; --json shows all of them.
_ELSEWHERE = frozenset({"n", "time", "previous", "event", "job", "job_uid", "pool", "index", "key", "reported_by"})


class AuditError(Exception):
    """The log cannot be read. ``str()`` is one line."""


@dataclass(frozen=True)
class Selection:
    """The records to show. Empty fields select all."""

    job: str = ""
    """The job's name, ``namespace/name``, or its UID."""
    key: str = ""
    event: str = ""

    def takes(self, record: dict[str, Any]) -> bool:
        """Return whether the record is selected."""
        names = {record.get("job"), record.get("job_uid")}
        return (
            self.job in ("", *names)
            and self.key in ("", record.get("key"))
            and self.event in ("", record.get("event"))
        )  # fmt: skip


def lines(path: Path) -> Generator[bytes]:
    """Yield the lines of the log without their ends. Raises :class:`AuditError`."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")
    except FileNotFoundError:
        raise AuditError(f"{path}: does not exist; the bridge has never run with this policy") from None
    except PermissionError:
        raise AuditError(f"{path}: permission denied; run this as the user who runs the bridge") from None
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from None


def as_json(path: Path, selection: Selection) -> Iterator[str]:
    """Yield the selected records as they are in the log. Raises :class:`AuditError`."""
    with closing(lines(path)) as found:
        for line in found:
            if (record := parse(line)) is not None and selection.takes(record):
                # Written with ASCII characters only, so it holds no control characters.
                yield json.dumps(record, separators=(",", ":"))


def as_table(path: Path, selection: Selection) -> Iterator[str]:
    """Yield the selected records as a table. Raises :class:`AuditError`.

    The columns have fixed widths, because the log may be larger than the memory.
    """
    with closing(lines(path)) as found:
        # Before the heads: it raises if the log cannot be read.
        first = next(found, b"")
        yield _aligned(_HEADS)
        for line in chain([first], found):
            if (record := parse(line)) is not None and selection.takes(record):
                yield _aligned(_cells(record))


def _aligned(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _cells(record: dict[str, Any]) -> Sequence[str]:
    client = "/".join(str(record[name]) for name in ("pool", "index") if name in record)
    details = " ".join(f"{name}={_value(value)}" for name, value in record.items() if name not in _ELSEWHERE and value)
    cells = (record.get("time", ""), record["event"], record.get("job", "-"), client or "-", details)
    return [_printable(str(cell)) for cell in cells]


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f'"{text}"' if " " in text else text


def _printable(text: str) -> str:
    # Parts of the log come from jobs: send no control characters to the terminal.
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def verification(path: Path, noted: str = "") -> tuple[bool, Iterator[str]]:
    """Check the log. Return whether it is intact, and the lines of the report. Raises :class:`AuditError`.

    ``noted``: a hash that an earlier verification printed, and that the log must still contain.
    """
    with closing(lines(path)) as found:
        verdict = verify(found, noted)
    return not verdict.faults and verdict.seen, _report(path, verdict, noted)


def _report(path: Path, verdict: Verdict, noted: str) -> Iterator[str]:
    yield from (f"problem: {fault}" for fault in verdict.faults)
    yield from (f"note: {note}" for note in verdict.notes)
    if not verdict.seen:
        yield f"problem: no line has the hash {noted}: the log was cut off or written anew"
    if verdict.faults or not verdict.seen:
        return
    yield f"{path}: {verdict.records} records, each follows the one before"
    if verdict.head.hash != GENESIS:
        yield f"hash of the last line: {verdict.head.hash}"
        yield "Note it outside this machine; `audit --verify --hash` shows later whether a line up to here is gone."
