"""Child processes that leave nothing behind."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

_LAUNCHER = Path(__file__).with_name("launch.py")
# How much of a log's end is read to find its last lines.
_TAIL_BYTES = 16_384


class Child:
    """A process in a session of its own, its output in a log file. It dies with us, whatever kills us."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start

    @classmethod
    async def spawn(cls, argv: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None) -> Self:
        """Starts a program; its output is added to ``log``. ``cwd``: where it runs, if not where we do."""
        with log.open("ab") as output:
            start = output.tell()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *argv,
                env=dict(environment), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, cwd=cwd,
            )  # fmt: skip
        return cls(process, log, start)

    @property
    def running(self) -> bool:
        """Whether it has not exited yet."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit code (negative: killed by that signal), once it and every process of its session's group is gone."""
        code = await self._process.wait()
        self._signal(signal.SIGKILL)
        return code

    async def stop(self, grace: float, hurry: asyncio.Event) -> None:
        """Asks it to end, and makes it end after ``grace`` seconds or at once when ``hurry`` is set."""
        if self.running:
            self._signal(signal.SIGTERM)
            waiting = [asyncio.create_task(self._process.wait()), asyncio.create_task(hurry.wait())]
            await asyncio.wait(waiting, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        self._signal(signal.SIGKILL)
        await self._process.wait()

    def last_lines(self, count: int) -> list[str]:
        """The last lines of its own output."""
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-count:]

    def _signal(self, number: signal.Signals) -> None:
        # The session's leader has the group's number, which stays taken as long as any member lives.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
