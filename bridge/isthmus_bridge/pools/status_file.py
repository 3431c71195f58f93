"""The file behind `isthmus-bridge status`, which the running bridge writes: it has locked the journal for itself."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.process import files

from .journal import Entry
from .pool_status import convert_or_log, to_pool

# Written this often even if nothing changes. Seconds.
HEARTBEAT_SECONDS = 30.0
_STALE_SECONDS = 90.0
_HEADS = ("KEY", "POOL", "CALLER", "USER", "PHASE", "JOB", "QUEUED", "RUNNING", "DONE", "FAILED", "SINCE", "WHY")
_LONGEST_WHY = 80


class StatusError(Exception):
    """The status cannot be shown. ``str()`` is one line."""


@dataclass(frozen=True)
class Line:
    """The line of one pool."""

    key: str
    pool: str
    caller: str
    phase: str
    job: str
    queued: int
    running: int
    succeeded: int
    failed: int
    since: float
    """When the pool was requested. Seconds since the epoch."""
    why: str
    user: str = ""
    """The local user who owns the jobs; empty for the bridge's own user."""


def line_of(entry: Entry) -> Line:
    """Return the line of a pool."""
    pool, spec = to_pool(entry), entry.pool_spec()
    return Line(
        entry.key, f"{spec.namespace}/{spec.job}/{spec.pool}", entry.identity, pb.Pool.Phase.Name(pool.phase),
        pool.slurm_job_id, pool.queued, pool.running, pool.succeeded, pool.failed, entry.created_at,
        pool.message or pool.reason, entry.user,
    )  # fmt: skip


class StatusFile:
    """Writer of the file, which it replaces atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = (-1,)
        self._written = 0.0

    def update(self, entries: Sequence[Entry], now: float) -> None:
        """Write the file if a pool has changed or the heartbeat is due. Raises ``OSError``."""
        versions = tuple(entry.version for entry in entries)
        if versions == self._seen and now < self._written + HEARTBEAT_SECONDS:
            return
        lines = [line for entry in entries if (line := convert_or_log(line_of, entry)) is not None]
        content = {"time": now, "pid": os.getpid(), "pools": [asdict(line) for line in lines]}
        files.replace(self._path, json.dumps(content).encode(), 0o600)
        self._seen, self._written = versions, now


def show(path: Path) -> Iterator[str]:
    """Yield the lines of the table. Raises :class:`StatusError`."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise StatusError(f"{path}: does not exist; the bridge has never run with this policy") from None
    except (OSError, ValueError) as error:
        raise StatusError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        lines = list(_lines(content))
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        raise StatusError(f"{path}: unknown format; the running bridge may be another version") from None
    yield from lines


def _lines(content: Any) -> Iterator[str]:
    age = time.time() - content["time"]
    alive = "is running" if age < _STALE_SECONDS else "is not running, or hangs"
    yield f"the bridge {alive} (pid {content['pid']}, last update {age:.0f} s ago); {len(content['pools'])} live pools"
    if content["pools"]:
        yield from _table([Line(**pool) for pool in content["pools"]])


def _table(lines: Iterable[Line]) -> Iterator[str]:
    rows = [_HEADS, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cells(line: Line) -> tuple[str, ...]:
    since = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(line.since))
    # Messages may hold a script's output: send no control characters to the terminal.
    why = "".join(character if character.isprintable() else " " for character in line.why)
    why = why if len(why) <= _LONGEST_WHY else why[: _LONGEST_WHY - 1] + "…"
    counts = (str(number) for number in (line.queued, line.running, line.succeeded, line.failed))
    return (line.key, line.pool, line.caller, line.user or "-", line.phase, line.job or "-", *counts, since, why)
