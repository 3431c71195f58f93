"""Collection of the clients' reports of what they sent into the site's audit log.

A job may write anything into its file. So lines are read up to bounds, checked, and marked as reported by the client.
After a crash between the two writes, lines are recorded twice, with the same ``offset``.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.departures import LONGEST_LINE, Departure

from ..audit.log import Record
from ..files import untrusted_files
from ..policy.policy import Policy
from ..users.pool_directory import PoolDirectory, pool_directory
from .audit_events import Auditor
from .journal import Entry

log = logging.getLogger(__name__)

# While a pool lives, its clients' files are read this often. Seconds.
_EVERY = 30.0
# Bytes that are read at once, of one client and of a pool.
PIECE = 1 << 16
_PIECES = 4 << 20
# Bytes that are taken from one client, and from one pool: some 40,000 and 700,000 lines.
MOST_OF_CLIENT = 16 << 20
MOST_OF_POOL = 256 << 20
_OFFSETS = "audit-offsets.json"


@dataclass(frozen=True)
class _Taken:
    """The progress in one client's file."""

    offset: int = 0
    total: int = 0
    """Bytes taken, also of a file that was replaced."""


class DepartureCollector:
    """Reader of the clients' files. Only one thread may use it at a time."""

    def __init__(self, policy: Policy, auditor: Auditor, monotonic: Callable[[], float]) -> None:
        self._policy = policy
        self._auditor = auditor
        self._monotonic = monotonic
        self._looked: dict[str, float] = {}

    def collect(self, entry: Entry, *, last: bool = False) -> None:
        """Record new lines of a pool's clients if it is time, or with ``last`` all that are left. Failures are
        logged."""
        now = self._monotonic()
        if last:
            self._looked.pop(entry.key, None)
        elif now < self._looked.get(entry.key, -math.inf) + _EVERY:
            return
        else:
            self._looked[entry.key] = now
        try:
            run = pool_directory(self._policy, entry.key, entry.user)
            while self._step(entry, run) and last:
                pass
        except OSError as error:
            log.error("cannot collect the clients' audit lines: %s", error.strerror, extra={"key": entry.key})

    def _step(self, entry: Entry, run: PoolDirectory) -> bool:
        """Record one piece of each client's lines. Return whether there were any."""
        spec = entry.pool_spec()
        taken = _read(run.guard)
        left = MOST_OF_POOL - sum(one.total for one in taken.values())
        if left <= 0:
            return False
        offsets = {index: one.offset for index, one in taken.items()}
        full = frozenset(index for index, one in taken.items() if one.total >= MOST_OF_CLIENT)
        pieces = run.departures(offsets, full, PIECE, min(left, _PIECES))
        records: list[Record] = []
        for index, (start, data) in sorted(pieces.items()):
            whole = _whole_lines(data)
            before = taken.get(index, _Taken())
            restarted = start < before.offset
            # A restart counts as a line, since it takes the space of one in the log.
            after = _Taken(start + len(whole), before.total + len(whole) + restarted * LONGEST_LINE)
            if after == before:
                continue
            taken[index] = after
            records += _records(entry.key, spec, index, start, whole, restarted=restarted)
            if after.total >= MOST_OF_CLIENT:
                records.append(_event(entry.key, spec, index, "limit", {"bytes": after.total}))
        if not records:
            return False
        self._auditor.left(records)
        content = {str(index): [one.offset, one.total] for index, one in taken.items()}
        untrusted_files.write(run.guard / _OFFSETS, json.dumps(content).encode())
        return True


def _whole_lines(data: bytes) -> bytes:
    """Return the data up to its last line's end; all of it if it holds no end where one is due."""
    whole = data[: data.rfind(b"\n") + 1]
    return whole if whole or len(data) <= LONGEST_LINE else data


def _records(key: str, spec: pb.PoolSpec, index: int, start: int, data: bytes, *, restarted: bool) -> Iterator[Record]:
    if restarted:
        yield _event(key, spec, index, "restarted", {})
    if not data:
        return
    malformed, offset = 0, start
    for line in data.removesuffix(b"\n").split(b"\n"):
        departure = Departure.parse(line)
        if departure is None or (departure.job, departure.pool) != (spec.job_uid, spec.pool):
            malformed += 1
        else:
            yield _event(key, spec, index, "left", {"offset": offset, **_reported(departure)})
        offset += len(line) + 1
    if malformed:
        yield _event(key, spec, index, "malformed", {"offset": start, "lines": malformed})


def _reported(departure: Departure) -> dict[str, Any]:
    # Job, pool and index are known from the file's place.
    fields = departure.model_dump(exclude={"job", "pool", "index", "time"})
    return {**fields, "client_time": departure.time}


def _event(key: str, spec: pb.PoolSpec, index: int, event: str, fields: dict[str, Any]) -> Record:
    where = {
        "reported_by": "client", "key": key, "job": f"{spec.namespace}/{spec.job}", "job_uid": spec.job_uid,
        "pool": spec.pool, "index": spec.first_index + index,
    }  # fmt: skip
    return event, where | fields


def _read(folder: Path) -> dict[int, _Taken]:
    """Return the progress by client. A file that was lost or damaged counts as none."""
    try:
        content = json.loads(untrusted_files.read(folder / _OFFSETS, 64 << 20))
        return {int(index): _Taken(max(0, int(one[0])), max(0, int(one[1]))) for index, one in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        log.warning("%s: unreadable; clients' audit lines are recorded again", folder / _OFFSETS)
        return {}
