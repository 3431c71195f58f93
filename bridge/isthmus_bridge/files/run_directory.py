"""The private directory of one pool, on the file system shared with the nodes. Its contents:

``.isthmus-pool``: shows that the bridge made the folder; ``batch.sh``: the script; ``client.sh``: the script of one
client, if a job starts several; ``code/``: the job's files; ``tls/``: the clients' credentials while the pool is live;
``tasks/``: markers of the start and end of each client; ``logs/``: one file per client; ``work/``: the clients' working
directories, with their audit files.
"""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus_contracts.identities import AUDIT_FILE

from . import untrusted_files

PATTERN_KEY = r"^[a-z0-9][a-z0-9-]{6,61}[a-z0-9]$"
TAIL_LINES = 20
TAIL_BYTES = 4096
# A marker: array id, Slurm's restart count, then the exit code or the node.
_MARK = re.compile(r"(\d{1,10}) (\d{1,6}) ([A-Za-z0-9._-]{1,255})\n?")
_MARK_BYTES = 512
# A file with the pool's key, in each folder that the bridge has made.
_MARK_OF_OURS = ".isthmus-pool"
_EXIT_CODE = re.compile(r"[0-9]{1,3}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,6}")
# Folder of the audit file, in the client's working directory, which its container sees.
AUDIT_FOLDER = ".isthmus-audit"


@dataclass(frozen=True)
class TaskMarker:
    """The recorded start and end of one task."""

    array_id: int
    node: str = ""
    exit_code: int | None = None
    """``None`` if it has not ended, or could not record its end."""


@dataclass(frozen=True)
class Exit:
    """The end of one start of a client."""

    array_id: int
    restarts: int
    code: int


def claim(path: Path) -> None:
    """Make a pool's private folder, and mark it as made by the bridge.

    Raises ``OSError``, also if something else exists at the path: the bridge never writes into, or removes, a folder
    that it has not made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise OSError(errno.EPERM, f"{path} exists, and is not a private folder of this user") from None
        if not claimed(path) and any(path.iterdir()):
            raise OSError(errno.EPERM, f"{path} exists, and holds files that the bridge has not made") from None
    if not claimed(path):
        untrusted_files.write(path / _MARK_OF_OURS, path.name.encode())


def claimed(path: Path) -> bool:
    """Return whether the bridge has made the folder."""
    return not path.is_symlink() and _content(path / _MARK_OF_OURS, _MARK_BYTES) == path.name.encode()


class RunDirectory:
    """Files of one pool, owned by the user of this process."""

    def __init__(self, root: Path, key: str) -> None:
        self.path = root / key
        self.guard = self.path
        """The folder where a submission under way is recorded."""
        self.script = self.path / "batch.sh"
        self.client_script = self.path / "client.sh"
        self.tls = self.path / "tls"
        self.code = self.path / "code"
        self._logs = self.path / "logs"
        self._tasks = self.path / "tasks"
        self._work = self.path / "work"

    @property
    def log_pattern(self) -> str:
        """The path of the tasks' logs, in Slurm's notation."""
        return f"{self._logs}/%a.log"

    def log(self, index: int) -> Path:
        """Return the path of one task's log."""
        return self._logs / f"{index}.log"

    @property
    def job_log_pattern(self) -> str:
        """The path of the logs of jobs with several clients; each client has a log of its own."""
        return f"{self._logs}/job-%a.log"

    def create(self, credentials: Mapping[str, bytes]) -> bool:
        """Make the directory. Return whether it holds a script, from an earlier submission. Raises ``OSError``."""
        claim(self.path)
        known = self.script.exists()
        for directory in (self._logs, self._tasks, self._work):
            directory.mkdir(mode=0o700, exist_ok=True)
        self.write_credentials(credentials)
        return known

    def write_credentials(self, credentials: Mapping[str, bytes]) -> None:
        """Replace each file atomically, since tasks may be reading them. Raises ``OSError``."""
        self.tls.mkdir(mode=0o700, exist_ok=True)
        if all(_content(self.tls / name) == content for name, content in credentials.items()):
            return
        with tempfile.TemporaryDirectory(prefix=".tls", dir=self.path) as fresh:
            for name, content in credentials.items():
                descriptor = os.open(Path(fresh) / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
            for name in credentials:
                (Path(fresh) / name).replace(self.tls / name)

    def write_code(self, files: Mapping[str, bytes]) -> None:
        """Write the files that tasks copy into their working directories. Names must be checked. Raises ``OSError``."""
        if not files:
            return
        self.code.mkdir(mode=0o700, exist_ok=True)
        for name, content in files.items():
            untrusted_files.write(self.code / name, content)

    def write_scripts(self, batch: str, client: str = "") -> None:
        """Write the batch script and, if it starts several clients, their script. Raises ``OSError``."""
        if client:
            untrusted_files.write(self.client_script, client.encode(), 0o700)
        untrusted_files.write(self.script, batch.encode(), 0o700)

    def holds_credentials(self) -> bool:
        """Return whether the pool's credentials may still be on disk here."""
        return self.tls.exists()

    def submitted(self) -> bool:
        """Return whether a script was ever written. Raises ``OSError``."""
        return self.script.exists()

    def forget_credentials(self) -> None:
        """Remove the credentials of a pool that is over. Raises ``OSError``."""
        untrusted_files.make_writable(self.path)
        untrusted_files.remove_tree(self.tls)

    def remove(self) -> None:
        """Remove the directory. Raises ``OSError``."""
        untrusted_files.remove_tree(self.path)

    def task_markers(self) -> dict[int, TaskMarker]:
        """Return the tasks' markers, by index. Malformed files are ignored."""
        found: dict[int, TaskMarker] = {}
        starts: dict[int, tuple[int, int]] = {}
        for index, kind, start, last in self._read_marks():
            array_id, ended = start[0], exit_code(last) if kind == "exit" else None
            old = found.get(index)
            if kind == "start":
                starts[index], old = start, None
            elif starts.get(index, start) != start:
                # The end of an earlier start: a requeued task's old process may still be running.
                continue
            node = last if kind == "start" else old.node if old else ""
            code = ended if ended is not None else old.exit_code if old else None
            found[index] = TaskMarker(array_id, node, code)
        return found

    def exits(self, wanted: Collection[int]) -> dict[int, Exit]:
        """Return the ends of the wanted clients, without those that still run. Raises ``OSError``."""
        found = {}
        for entry in self._tasks.iterdir():
            index, _, ending = entry.name.partition(".")
            if ending != "exit" or not index.isdecimal() or int(index) not in wanted:
                continue
            match = _MARK.fullmatch(_content(entry, _MARK_BYTES).decode("utf-8", "replace"))
            if match is not None and (code := exit_code(match[3])) is not None:
                found[int(index)] = Exit(int(match[1]), int(match[2]), code)
        return found

    def _read_marks(self) -> Iterator[tuple[int, str, tuple[int, int], str]]:
        """Yield index, kind, (array, restart) and the last field of each marker, the starts first."""
        try:
            names = sorted(entry.name for entry in self._tasks.iterdir())
        except FileNotFoundError:
            return
        for kind in ("start", "exit"):
            for name in names:
                index, _, ending = name.partition(".")
                if ending != kind or not index.isdecimal():
                    continue
                match = _MARK.fullmatch(_content(self._tasks / name, _MARK_BYTES).decode("utf-8", "replace"))
                if match is not None:
                    yield int(index), kind, (int(match[1]), int(match[2])), match[3]

    def tails(
        self, indices: Iterable[int], lines: int = TAIL_LINES, limit: int = TAIL_BYTES, *, of_jobs: bool = False
    ) -> dict[int, str]:
        """Return at most ``lines`` last lines and ``limit`` bytes of the logs of some tasks; empty if there is no log.

        ``of_jobs``: read the logs of jobs with several clients, which hold errors from before the clients started.
        """
        log = self._job_log if of_jobs else self.log
        return {index: _tail(log(index), lines, limit) for index in indices}

    def log_tail(self, index: int, lines: int, limit: int) -> str:
        """Return the last lines of one task's log, or a line that says why there are none."""
        log = self.log(index)
        try:
            untrusted_files.opened(log).close()
        except FileNotFoundError:
            return f"isthmus: there is no log of task {index}: it has not started, or {log} was removed"
        except OSError as error:
            return f"isthmus: the log of task {index} cannot be read: {error.strerror or error} ({log})"
        return _tail(log, lines, limit)

    def departures(
        self, offsets: Mapping[int, int], full: Collection[int], piece: int, most: int
    ) -> dict[int, tuple[int, bytes]]:
        """Return new bytes of the clients' audit files, by index, each with its offset in the file. Raises ``OSError``.

        ``offsets``: where to begin; at 0 for others, and where the file is shorter. ``full``: clients to leave out.
        ``piece``, ``most``: bounds on the bytes of one client, and of all.
        """
        found: dict[int, tuple[int, bytes]] = {}
        for index in sorted(int(entry.name) for entry in self._work.iterdir() if _INDEX.fullmatch(entry.name)):
            if index in full:
                continue
            try:
                with untrusted_files.opened(self._work / str(index) / AUDIT_FOLDER / AUDIT_FILE) as file:
                    size, start = file.seek(0, os.SEEK_END), offsets.get(index, 0)
                    start = start if start <= size else 0
                    file.seek(start)
                    data = file.read(min(piece, most))
            except OSError:
                # Not written yet, or not a file.
                continue
            if data or start < offsets.get(index, 0):
                found[index] = start, data
                most -= len(data)
            if most <= 0:
                break
        return found

    def _job_log(self, index: int) -> Path:
        return self._logs / f"job-{index}.log"


def _tail(log: Path, lines: int, limit: int) -> str:
    data, cut = _end(log, limit)
    text = data.decode("utf-8", "replace").replace("\0", "\ufffd")
    listed = text.splitlines()
    if cut and len(listed) > 1:
        # The first line is cut off.
        listed = listed[1:]
    return "\n".join(listed[-lines:])


def exit_code(text: str) -> int | None:
    """Return the exit code in a marker; ``None`` if it is not from 0 to 255."""
    code = int(text) if _EXIT_CODE.fullmatch(text) else 256
    return code if code < 256 else None


def _content(path: Path, limit: int = 1 << 20) -> bytes:
    try:
        return untrusted_files.read(path, limit)
    except OSError:
        return b""


def _end(path: Path, limit: int) -> tuple[bytes, bool]:
    try:
        with untrusted_files.opened(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            return file.read(limit), size > limit
    except OSError:
        return b"", False
