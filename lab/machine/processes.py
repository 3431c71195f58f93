"""Daemons that outlive the command that started them, tracked with pid files.

A pid alone is not enough: the file also contains the process's start time, which differs for a recycled pid. Signals
go through a descriptor of the process, so that it cannot change between the check of the start time and the signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lab.machine.errors import LabError

# A killed process may first have to release gigabytes.
_END_SECONDS = 60.0


def start_time(pid: int) -> int | None:
    """Return the kernel's start time of a live process, or None if it does not exist or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the program's name, may contain spaces and parentheses: count from its end.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def resident_mib(pid: int) -> int:
    """Return the resident memory of a process in MiB, or 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def _signal(pid: int, began: int, number: signal.Signals) -> None:
    """Signal the process with that start time; do nothing if it has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_time(pid) == began:
            signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def end(pids: Iterable[int], grace: float = 5.0) -> None:
    """Terminate processes and kill those that still run after the grace period."""
    known = {pid: began for pid in pids if (began := start_time(pid)) is not None}

    def remaining() -> list[int]:
        return [pid for pid, began in known.items() if start_time(pid) == began]

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid, began in known.items():
            _signal(pid, began, number)
        deadline = time.monotonic() + (grace if number == signal.SIGTERM else 30.0)
        while remaining() and time.monotonic() < deadline:
            time.sleep(0.05)
        if not remaining():
            return
    raise LabError(f"processes {remaining()} do not end; look at them with ps, then run `down` again")


class Supervisor:
    """Supervisor that starts, finds and ends the daemons of one lab."""

    def __init__(self, run: Path, log: Path) -> None:
        self._run = run
        self._log = log

    def start(self, name: str, argv: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None) -> None:
        """Start a daemon in a session of its own, its output going to log/NAME.log."""
        with self.log_file(name).open("ab") as output:
            process = subprocess.Popen(
                [os.fspath(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env) if env is not None else None,
                cwd="/",
                start_new_session=True,
            )
        record = {"pid": process.pid, "started": start_time(process.pid), "argv": process.args}
        self._record(name).write_text(json.dumps(record))
        # The daemon outlives this process, which never waits for it: suppress the warning of Popen.
        process.returncode = 0

    def pid(self, name: str) -> int | None:
        """Return the pid of a daemon if it still runs."""
        try:
            record = json.loads(self._record(name).read_text())
        except (FileNotFoundError, ValueError):
            return None
        pid = int(record["pid"])
        began = start_time(pid)
        return pid if began is not None and began == record["started"] else None

    def names(self) -> list[str]:
        """Return the daemons that were started and not stopped, whether they run or not."""
        return sorted(path.stem for path in self._run.glob("*.pid"))

    def kill(self, name: str) -> None:
        """Kill a daemon as a crash would; :meth:`again` restarts it."""
        pid = self.pid(name)
        began = start_time(pid) if pid is not None else None
        if pid is None or began is None:
            raise LabError(f"{name} does not run")
        _signal(pid, began, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        while self.pid(name) is not None:  # else `again` would find it running
            if time.monotonic() > deadline:
                raise LabError(f"{name} (pid {pid}) does not end")
            time.sleep(0.02)

    def again(self, name: str) -> None:
        """Restart a daemon that has ended, with its previous command line."""
        if self.pid(name) is None:
            self.start(name, json.loads(self._record(name).read_text())["argv"])

    def stop(self, names: Iterable[str], grace: float = 5.0) -> None:
        """Stop daemons and remove their pid files."""
        chosen = list(names)
        end([pid for name in chosen if (pid := self.pid(name)) is not None], grace)
        for name in chosen:
            self._record(name).unlink(missing_ok=True)

    def wait(self, what: str, ready: Callable[[], bool], names: Iterable[str], timeout: float = 180.0) -> None:
        """Wait until ready; fail early, with the end of the log, when one of the daemons it needs has died."""
        needed = list(names)
        deadline = time.monotonic() + timeout
        while not ready():
            for name in needed:
                if self.pid(name) is None:
                    raise LabError(f"{name} ended while waiting for {what}; {self.log_tail(name)}")
            if time.monotonic() > deadline:
                tails = "\n".join(self.log_tail(name) for name in needed)
                raise LabError(f"{what}: not ready after {timeout:.0f} s; {tails}")
            time.sleep(0.1)

    def log_file(self, name: str) -> Path:
        return self._log / f"{name}.log"

    def log_tail(self, name: str, lines: int = 12) -> str:
        path = self.log_file(name)
        text = path.read_text(errors="replace") if path.exists() else ""
        tail = "\n".join(f"    {line[:300]}" for line in text.splitlines()[-lines:])
        return f"the end of {path}:\n{tail}"

    def _record(self, name: str) -> Path:
        return self._run / f"{name}.pid"
