"""Child processes under a supervisor, which ends all processes that they start."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from isthmus_contracts.launchers import script_lines
from isthmus_contracts.text import shown_line

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
# Size of the end of a log that is read for its last lines.
_TAIL_BYTES = 16_384


class ChildProcess:
    """A program under a supervisor (see supervisor.py), with its output in a log file.

    It ends, with all processes that it has started, when the runner does, however that ends. The runner uses no process
    ids: signals are sent to the supervisor through a pipe, and its closing shows that the runner is gone.
    """

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, log: Path, log_start: int) -> None:
        """``lifeline``: the runner's end of the pipe."""
        self._process = process
        self._lifeline: int | None = lifeline
        self._log = log
        self._log_start = log_start

    @classmethod
    async def spawn(cls, argv: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None) -> Self:
        """Start a program; its output is appended to ``log``. ``cwd``: working directory, by default the runner's."""
        child_end, lifeline = os.pipe()
        try:
            with log.open("ab") as output:
                start = output.tell()
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", str(_SUPERVISOR), *argv,
                    env=dict(environment), stdin=child_end, stdout=output, stderr=output,
                    start_new_session=True, cwd=cwd,
                )  # fmt: skip
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(child_end)
        return cls(process, lifeline, log, start)

    @property
    def running(self) -> bool:
        """True until the program has exited."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait until the program and every process that it started are gone; return its exit code.

        A negative code is the number of the signal that killed it.
        """
        code = await self._process.wait()
        self._close_lifeline()
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program's process group."""
        if self._lifeline is not None:
            with suppress(BrokenPipeError):
                os.write(self._lifeline, bytes([number]))

    async def stop(self, grace: float, hurry: asyncio.Event) -> None:
        """Send SIGTERM, and kill the program after ``grace`` seconds, or as soon as ``hurry`` is set."""
        if self.running:
            self.send(signal.SIGTERM)
            waiting = [asyncio.create_task(self._process.wait()), asyncio.create_task(hurry.wait())]
            await asyncio.wait(waiting, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        self._close_lifeline()
        await self._process.wait()

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of its output that are not blank, each made safe for a terminal.

        A launcher's (torchrun's) report of a failed script is left out if the script's own output gives the reason.
        """
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        lines = [shown for line in script_lines(text.splitlines()) if (shown := shown_line(line))]
        return lines[-count:]

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
