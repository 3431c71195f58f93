"""The bridge's memory: one SQLite file, one writer, every change on disk before it counts."""

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
    """The journal cannot be opened or is not ours. ``str()`` is one line."""


class State(StrEnum):
    """How far a pool has come."""

    RESERVED = "RESERVED"  # recorded; sbatch has not been run, or is known not to have submitted
    SUBMITTING = "SUBMITTING"  # sbatch was about to run: recorded before it starts
    UNKNOWN = "UNKNOWN"  # sbatch's answer is missing or doubtful: the pool must be looked up
    SUBMITTED = "SUBMITTED"  # Slurm has one array
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def over(self) -> bool:
        """True if nothing will change any more."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


OVER = tuple(state.value for state in State if state.over)


@dataclass(frozen=True)
class Entry:
    """What the journal knows about one key."""

    key: str
    identity: str
    state: State
    version: int = 0
    spec: bytes = b""
    """The PoolSpec without credentials; empty: a tombstone, cancelled before it was asked for."""
    digest: str = ""
    cancel: bool = False
    message: str = ""
    array_id: int = 0
    submissions: int = 0
    """How often sbatch was run."""
    unknown_since: float = 0.0
    """When sbatch was over, in the state UNKNOWN; when the tasks were first missed, in SUBMITTED."""
    missed_lookups: int = 0
    """Healthy look-ups since then that found nothing."""
    retry_at: float = 0.0
    """No submission before this time."""
    created_at: float = 0.0
    submitted_at: float = 0.0
    finished_at: float = 0.0
    stale: str = ""
    """Why Slurm cannot be asked at the moment; the observation is then the last one."""
    observation: Observation = field(default_factory=Observation)
    kept_replicas: int = 0
    """So many clients stay, where the pool was shrunk; 0: all."""
    user: str = ""
    """The local user who owns its files and jobs; empty: the bridge's own."""

    def pool_spec(self) -> pb.PoolSpec:
        """The spec as a message: as the pool is now, with as many clients as stay."""
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
# "ISTH", in the file's header: no other program's database is taken for a journal.
_APPLICATION = 0x49535448
# 1 to 3 were in use before the first release.
_SCHEMA_VERSION = 4
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM pools"  # noqa: S608 - our own column names
_INSERT = f"INSERT INTO pools ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608


class Journal:
    """The table of pools. Every method is one transaction, durable when it returns; threads may share it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, patience: float = 5.0) -> None:
        """``patience``: how long to wait for another process to let go of the file. Raises :class:`JournalError`."""
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
        """Of the latest change of any pool."""
        return self._version

    @property
    def removed(self) -> bool:
        """True if the file is no longer in its place: the next bridge would know none of the pools."""
        try:
            self._path.stat()
        except FileNotFoundError:
            return True
        except OSError:  # a file system that hiccups
            return False
        return False

    def close(self) -> None:
        """Closes the file; puts it in its place again where it was removed. Raises :class:`JournalError`."""
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
                raise JournalError(f"journal {self._path} was removed, and cannot be written again: {error}") from None
            finally:
                # Removes its -wal, which must not meet the copy.
                self._connection.close()
                self._closed = True
            copy.rename(self._path)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Groups several calls into one commit."""
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
        """The entry of a key."""
        found = self._query(f"{_SELECT} WHERE key = ?", key)
        return found[0] if found else None

    def live(self) -> list[Entry]:
        """All pools that are not over, oldest first."""
        marks = ", ".join("?" * len(OVER))
        return self._query(f"{_SELECT} WHERE state NOT IN ({marks}) ORDER BY created_at, key", *OVER)

    def finished_before(self, moment: float) -> list[Entry]:
        """Pools that were over before that time."""
        marks = ", ".join("?" * len(OVER))
        return self._query(f"{_SELECT} WHERE state IN ({marks}) AND finished_at < ?", *OVER, moment)

    def live_specs(self, identity: str | None = None) -> list[pb.PoolSpec]:
        """The caller's pools (or all callers') that are not over, with the clients that their jobs hold."""
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
        """Returns how many keys the caller has cancelled without ever asking for them."""
        sql = "SELECT count(*) FROM pools WHERE identity = ? AND length(spec) = 0"
        with self._lock:
            return int(self._connection.execute(sql, (identity,)).fetchone()[0])

    def count_since(self, identity: str, moment: float) -> int:
        """Return how many pools the caller has asked for since then."""
        sql = "SELECT count(*) FROM pools WHERE identity = ? AND created_at > ? AND length(spec) > 0"
        with self._lock:
            return int(self._connection.execute(sql, (identity, moment)).fetchone()[0])

    def insert(self, entry: Entry) -> Entry:
        """Records a new key. Raises ``sqlite3.IntegrityError`` where it exists."""
        with self.transaction():
            stored = replace(entry, version=self._next_version())
            self._connection.execute(_INSERT, _row(stored))
            return stored

    def update(self, key: str, **changes: Any) -> Entry:
        """Changes fields of an entry, gives it a new version, and returns it. Raises ``KeyError``."""
        with self.transaction():
            entry = self.get(key)
            if entry is None:
                raise KeyError(key)
            stored = replace(entry, **changes, version=self._next_version())
            if stored.state.over:
                # The files of a finished pool are never laid out again, and are most of what it takes up.
                stored = replace(stored, spec=_without_code(stored.spec))
            columns = ", ".join(f"{name} = ?" for name in _COLUMNS)
            self._connection.execute(f"UPDATE pools SET {columns} WHERE key = ?", (*_row(stored), key))  # noqa: S608
            return stored

    def delete(self, key: str) -> None:
        """Forgets a key."""
        with self.transaction():
            self._connection.execute("DELETE FROM pools WHERE key = ?", (key,))

    def _next_version(self) -> int:
        # Not below the clock: versions go on growing where a journal was lost.
        self._version = max(self._version + 1, int(self._clock() * 1000))
        return self._version

    def _query(self, sql: str, *values: Any) -> list[Entry]:
        with self._lock:
            return [_entry(row) for row in self._connection.execute(sql, values).fetchall()]


def _make_private(path: Path) -> None:
    """Before SQLite opens it: the files that it puts beside it (-wal) get the mode that this one has then."""
    # One that exists is not opened here: closing it would end the locks that this process may have on it.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        with suppress(FileNotFoundError):
            path.with_name(name).chmod(0o600)


def _spec(content: bytes, kept_replicas: int) -> pb.PoolSpec:
    spec = pb.PoolSpec.FromString(content)
    if kept_replicas:
        # What its clients are told stays as it was.
        spec.pool_size = spec.pool_size or spec.replicas
        spec.replicas = kept_replicas
    return spec


def _occupied(content: bytes, kept_replicas: int) -> pb.PoolSpec:
    spec, asked = _spec(content, kept_replicas), pb.PoolSpec.FromString(content).replicas
    # A job of which one client stays goes on with all of them.
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
