"""The bridge's persistent state: one SQLite file with one writer. Changes are durable before they take effect."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from isthmus_contracts.pb import bridge_pb2 as pb

from ..clients_per_job import jobs_for, per_job
from .observation import Observation


class JournalError(Exception):
    """The journal cannot be opened, or belongs to another program. ``str()`` is one line."""


class State(StrEnum):
    """The progress of a pool in the journal. :mod:`.pool_status` derives the protocol's ``Phase`` from it."""

    RESERVED = "RESERVED"  # recorded; sbatch has not run, or is known to have submitted nothing
    SUBMITTING = "SUBMITTING"  # recorded before sbatch starts
    UNKNOWN = "UNKNOWN"  # sbatch's answer is missing or ambiguous: the pool must be looked up
    SUBMITTED = "SUBMITTED"  # Slurm has one array
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def over(self) -> bool:
        """True if the state is final."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


OVER = tuple(state.value for state in State if state.over)


@dataclass(frozen=True)
class Entry:
    """The recorded state of one key."""

    key: str
    identity: str
    state: State
    version: int = 0
    spec: bytes = b""
    """The serialized PoolSpec without credentials; empty for a tombstone (cancelled before it was requested)."""
    digest: str = ""
    cancel: bool = False
    message: str = ""
    array_id: int = 0
    submissions: int = 0
    """Number of runs of sbatch."""
    unknown_since: float = 0.0
    """When sbatch ended (state UNKNOWN), or when tasks were first missing (SUBMITTED). Seconds since the epoch."""
    missed_lookups: int = 0
    """Successful look-ups since then that found nothing."""
    retry_at: float = 0.0
    """No submission before this time."""
    created_at: float = 0.0
    submitted_at: float = 0.0
    finished_at: float = 0.0
    stale: str = ""
    """Why Slurm cannot be queried at the moment (the observation is then the last known one); empty if it can."""
    observation: Observation = field(default_factory=Observation)
    kept_replicas: int = 0
    """Number of clients that stay in a shrunk pool; 0 for a pool that was not shrunk."""
    user: str = ""
    """The local user who owns its files and jobs; empty for the bridge's own user."""

    def pool_spec(self) -> pb.PoolSpec:
        """Return the spec of the pool as it is now, with the number of clients that stay."""
        return _spec(self.spec, self.kept_replicas)


_COLUMNS: Mapping[str, str] = {
    "key": "TEXT PRIMARY KEY",
    "identity": "TEXT NOT NULL",
    "state": "TEXT NOT NULL",
    "version": "INTEGER NOT NULL",
    "spec": "BLOB NOT NULL",
    "digest": "TEXT NOT NULL",
    "cancel": "INTEGER NOT NULL",
    "message": "TEXT NOT NULL",
    "array_id": "INTEGER NOT NULL",
    "submissions": "INTEGER NOT NULL",
    "unknown_since": "REAL NOT NULL",
    "missed_lookups": "INTEGER NOT NULL",
    "retry_at": "REAL NOT NULL",
    "created_at": "REAL NOT NULL",
    "submitted_at": "REAL NOT NULL",
    "finished_at": "REAL NOT NULL",
    "stale": "TEXT NOT NULL",
    "observation": "TEXT NOT NULL",
    "kept_replicas": "INTEGER NOT NULL",
    "user": "TEXT NOT NULL",
}
# "ISTH", in the header of the file, so that no other program's database is taken for a journal.
_APPLICATION = 0x49535448
# 1 to 3 were in use before the first release.
_SCHEMA_VERSION = 4
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM pools"  # noqa: S608 - our own column names
_INSERT = f"INSERT INTO pools ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608


class Journal:
    """The table of pools. Every method is one transaction, durable when it returns. Thread-safe."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, patience: float = 5.0) -> None:
        """``patience``: seconds to wait for another process to release the file. Raises :class:`JournalError`."""
        self._path = path
        self._closed = False
        self._clock = clock
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(path)
            self._connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
            # Exclusive: a second bridge on the same journal must not run, and WAL then needs no shared memory, which
            # network file systems lack.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.execute("BEGIN IMMEDIATE")
            self._prepare(path)
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            reason = "another bridge uses it" if "locked" in str(error) else str(error)
            raise JournalError(f"journal {path}: {reason}") from None
        except sqlite3.DatabaseError as error:
            raise JournalError(f"journal {path}: {error}") from None
        except OSError as error:
            raise JournalError(f"journal {path}: {error.strerror}") from None

    def _prepare(self, path: Path) -> None:
        application = self._connection.execute("PRAGMA application_id").fetchone()[0]
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) == (0, 0):
            columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            self._connection.execute(f"CREATE TABLE pools ({columns})")
            self._connection.execute(f"PRAGMA application_id={_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        elif (application, version) != (_APPLICATION, _SCHEMA_VERSION):
            raise JournalError(f"journal {path}: made by another program or another version of the bridge")
        last = self._connection.execute("SELECT max(version) FROM pools").fetchone()[0]
        self._version: int = last or 0

    @property
    def version(self) -> int:
        """The version of the latest change of any pool."""
        return self._version

    @property
    def removed(self) -> bool:
        """True if the file was removed: the next bridge would know none of the pools."""
        try:
            self._path.stat()
        except FileNotFoundError:
            return True
        except OSError:  # a temporary error of the file system
            return False
        return False

    def close(self) -> None:
        """Close the file; write it again if it was removed. Raises :class:`JournalError`."""
        copy = self._path.with_name(f"{self._path.name}.saved")
        with self._lock:
            try:
                if self._closed or not self.removed:
                    return
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _make_private(copy)
                with closing(sqlite3.connect(copy, isolation_level=None)) as saved:
                    self._connection.backup(saved)
            except (OSError, sqlite3.Error) as error:
                raise JournalError(f"journal {self._path} was removed and cannot be written again: {error}") from None
            finally:
                # This removes its -wal file, which must not be applied to the copy.
                self._connection.close()
                self._closed = True
            copy.rename(self._path)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group several calls into one transaction."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self.changed.notify_all()

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, or ``None``."""
        found = self._query(f"{_SELECT} WHERE key = ?", key)
        return found[0] if found else None

    def live(self) -> list[Entry]:
        """Return all pools that are not over, oldest first."""
        marks = ", ".join("?" * len(OVER))
        return self._query(f"{_SELECT} WHERE state NOT IN ({marks}) ORDER BY created_at, key", *OVER)

    def finished_before(self, moment: float) -> list[Entry]:
        """Return the pools that ended before that time, in seconds since the epoch."""
        marks = ", ".join("?" * len(OVER))
        return self._query(f"{_SELECT} WHERE state IN ({marks}) AND finished_at < ?", *OVER, moment)

    def live_specs(self, identity: str | None = None) -> list[pb.PoolSpec]:
        """Return the specs of a caller's (or all) live pools, counting the clients that their jobs hold."""
        marks = ", ".join("?" * len(OVER))
        sql = f"SELECT spec, kept_replicas FROM pools WHERE state NOT IN ({marks})"  # noqa: S608
        values = [*OVER]
        if identity is not None:
            sql += " AND identity = ?"
            values.append(identity)
        with self._lock:
            rows = self._connection.execute(sql, values).fetchall()
        return [_occupied(*row) for row in rows]

    def count_tombstones(self, identity: str) -> int:
        """Return how many keys the caller has cancelled without having requested them."""
        sql = "SELECT count(*) FROM pools WHERE identity = ? AND length(spec) = 0"
        with self._lock:
            return int(self._connection.execute(sql, (identity,)).fetchone()[0])

    def count_since(self, identity: str, moment: float) -> int:
        """Return how many pools the caller has requested since then."""
        sql = "SELECT count(*) FROM pools WHERE identity = ? AND created_at > ? AND length(spec) > 0"
        with self._lock:
            return int(self._connection.execute(sql, (identity, moment)).fetchone()[0])

    def insert(self, entry: Entry) -> Entry:
        """Record a new key, and return the stored entry. Raises ``sqlite3.IntegrityError`` if the key exists."""
        with self.transaction():
            stored = replace(entry, version=self._next_version())
            self._connection.execute(_INSERT, _row(stored))
            return stored

    def update(self, key: str, **changes: Any) -> Entry:
        """Change fields of an entry, give it a new version, and return it. Raises ``KeyError``."""
        with self.transaction():
            entry = self.get(key)
            if entry is None:
                raise KeyError(key)
            stored = replace(entry, **changes, version=self._next_version())
            if stored.state.over:
                # The files of a finished pool are never written again, and take most of its space.
                stored = replace(stored, spec=_without_code(stored.spec))
            columns = ", ".join(f"{name} = ?" for name in _COLUMNS)
            self._connection.execute(f"UPDATE pools SET {columns} WHERE key = ?", (*_row(stored), key))  # noqa: S608
            return stored

    def delete(self, key: str) -> None:
        """Delete a key."""
        with self.transaction():
            self._connection.execute("DELETE FROM pools WHERE key = ?", (key,))

    def _next_version(self) -> int:
        # At least the clock's milliseconds, so that versions keep increasing after a journal was lost.
        self._version = max(self._version + 1, int(self._clock() * 1000))
        return self._version

    def _query(self, sql: str, *values: Any) -> list[Entry]:
        with self._lock:
            return [_entry(row) for row in self._connection.execute(sql, values).fetchall()]


def _make_private(path: Path) -> None:
    """Create the file with mode 0600 before SQLite opens it: SQLite gives its -wal file the mode of the database."""
    # Do not open a file that exists: closing it would release the locks that this process may hold on it.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        with suppress(FileNotFoundError):
            path.with_name(name).chmod(0o600)


def _spec(content: bytes, kept_replicas: int) -> pb.PoolSpec:
    spec = pb.PoolSpec.FromString(content)
    if kept_replicas:
        # Clients still see the original pool size.
        spec.pool_size = spec.pool_size or spec.replicas
        spec.replicas = kept_replicas
    return spec


def _occupied(content: bytes, kept_replicas: int) -> pb.PoolSpec:
    spec, asked = _spec(content, kept_replicas), pb.PoolSpec.FromString(content).replicas
    # A job in which at least one client stays keeps running with all of its clients.
    spec.replicas = min(asked, jobs_for(spec) * per_job(spec))
    return spec


def _row(entry: Entry) -> tuple[Any, ...]:
    values = []
    for name in _COLUMNS:
        value = getattr(entry, name)
        if name == "observation":
            value = value.to_json()
        elif name == "cancel":
            value = int(value)
        elif name == "state":
            value = str(value)
        values.append(value)
    return tuple(values)


def _entry(row: tuple[Any, ...]) -> Entry:
    fields = dict(zip(_COLUMNS, row, strict=True))
    fields["state"] = State(fields["state"])
    fields["cancel"] = bool(fields["cancel"])
    fields["observation"] = Observation.from_json(fields["observation"])
    return Entry(**fields)


def _without_code(spec: bytes) -> bytes:
    if not spec:
        return spec
    message = pb.PoolSpec.FromString(spec)
    message.ClearField("code")
    return message.SerializeToString()
