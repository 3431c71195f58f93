"""Child processes that leave nothing behind."""

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

_SUPERVISOR = Path(__file__).with_name("supervise.py")
# How much of a log's end is read to find its last lines.
_TAIL_BYTES = 16_384


class Child:
    """A program under a supervisor (see supervise.py), its output in a log file.

    It ends with all that it has started when we do, whatever kills us. We hold no process number of theirs: signals go
    to the supervisor through a pipe, whose end is what tells it that we are gone.
    """

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, log: Path, log_start: int) -> None:
        """``lifeline``: the pipe's descriptor on our side."""
        self._process = process
        self._lifeline: int | None = lifeline
        self._log = log
        self._log_start = log_start

    @classmethod
    async def spawn(cls, argv: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None) -> Self:
        """Starts a program; its output is added to ``log``. ``cwd``: where it runs, if not where we do."""
        theirs, ours = os.pipe()
        try:
            with log.open("ab") as output:
                start = output.tell()
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", str(_SUPERVISOR), *argv,
                    env=dict(environment), stdin=theirs, stdout=output, stderr=output,
                    start_new_session=True, cwd=cwd,
                )  # fmt: skip
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return cls(process, ours, log, start)

    @property
    def running(self) -> bool:
        """True if it has not exited yet."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit code (negative: killed by that signal), once it and every process that it started is gone."""
        code = await self._process.wait()
        self._let_go()
        return code

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the program and the other processes of its group."""
        if self._lifeline is not None:
            with suppress(BrokenPipeError):
                os.write(self._lifeline, bytes([number]))

    async def stop(self, grace: float, hurry: asyncio.Event) -> None:
        """Asks it to end, and makes it end after ``grace`` seconds or at once when ``hurry`` is set."""
        if self.running:
            self.send(signal.SIGTERM)
            waiting = [asyncio.create_task(self._process.wait()), asyncio.create_task(hurry.wait())]
            await asyncio.wait(waiting, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        self._let_go()
        await self._process.wait()

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of its own output that are not blank, each fit for a terminal.

        The report of a launcher (torchrun) that the script failed is left out where the script says why.
        """
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        lines = [shown for line in script_lines(text.splitlines()) if (shown := shown_line(line))]
        return lines[-count:]

    def _let_go(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
