"""The lines of the audit log, each of which holds the SHA-256 of the line before. Pure functions.

A changed, removed or inserted line shows unless every later line is changed as well. Removed last lines show only to
an admin who has noted the hash of a later line.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# The first line's `previous`, since no line precedes it.
GENESIS = "0" * 64
# The event after a line that was not written to its end.
TORN = "torn"
_MOST_FAULTS = 20


@dataclass(frozen=True)
class Head:
    """The end of a chain."""

    number: int = 0
    """Number of the last record, counted from 1."""
    hash: str = GENESIS
    """SHA-256 of the last line."""


def hash_of(line: bytes) -> str:
    """Return the hash of a line, which is given without its end."""
    return hashlib.sha256(line).hexdigest()


def record_line(head: Head, time: float, event: str, fields: Mapping[str, Any]) -> tuple[bytes, Head]:
    """Return the next line, without its end, and the new head. ``time``: seconds since the epoch."""
    moment = dt.datetime.fromtimestamp(time, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {"n": head.number + 1, "time": moment, "previous": head.hash, "event": event, **fields}
    line = json.dumps(record, separators=(",", ":")).encode()
    return line, Head(head.number + 1, hash_of(line))


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; ``None`` if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("n")) is not int or not isinstance(record.get("event"), str):
        return None
    return record


@dataclass(frozen=True)
class Verdict:
    """The result of a verification."""

    records: int
    head: Head
    faults: tuple[str, ...]
    """One line each; empty for an intact log."""
    notes: tuple[str, ...]
    seen: bool
    """True if the noted hash was found."""


def verify(lines: Iterable[bytes], noted: str = "") -> Verdict:
    """Check the chain of all lines, which are given without their ends. ``noted``: a hash that must occur."""
    head, faults, notes = Head(), list[str](), list[str]()
    records, seen, fragment = 0, noted in ("", GENESIS), 0
    for number, line in enumerate(lines, 1):
        record = parse(line)
        if record is None:
            if fragment:
                faults.append(f"line {fragment}: damaged")
            fragment, head = number, Head(head.number, hash_of(line))
        else:
            if fragment and record["event"] != TORN:
                faults.append(f"line {fragment}: damaged")
            elif fragment:
                notes.append(f"line {fragment}: incomplete, because the bridge died or the disk was full")
            fragment = 0
            if record.get("previous") != head.hash:
                before = "is not the first" if number == 1 else f"does not follow line {number - 1}"
                faults.append(f"line {number}: {before}: lines were changed, removed or inserted here")
            elif record["n"] != head.number + 1:
                faults.append(f"line {number}: has the number {record['n']}, not {head.number + 1}")
            records += 1
            head = Head(record["n"], hash_of(line))
        seen = seen or head.hash == noted
        if len(faults) >= _MOST_FAULTS:
            faults.append("and more")
            break
    if fragment:
        notes.append(f"line {fragment}: incomplete; the bridge is writing it, died, or the disk was full")
    return Verdict(records, head, tuple(faults), tuple(notes), seen)
