"""What a sink is, and the thread in which it may fail as it likes."""

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

# What a sink has not taken yet; what comes on top of it is lost.
_BACKLOG = 1000
_RETRY_SECONDS = 5.0


class Sink(ABC):
    """Takes a run's numbers. All calls come from one thread, may block and may raise anything; they are repeated."""

    name: str
    requirement: str
    """What to install."""

    @abstractmethod
    def open(self) -> None:
        """Imports what it needs and connects. Raises ``ImportError`` where that is not installed."""

    @abstractmethod
    def write(self, round_number: int, time: float, values: Mapping[str, float]) -> None:
        """Numbers of a round, at a time in seconds since the epoch."""

    @abstractmethod
    def finish(self, succeeded: bool, tags: Mapping[str, str]) -> None:
        """The job is over; ``tags`` tell of the final model."""


class Worker:
    """Feeds one sink from a thread of its own; whoever hands in never waits."""

    def __init__(self, sink: Sink, backlog: int = _BACKLOG, retry_seconds: float = _RETRY_SECONDS) -> None:
        self.note = ""
        """What is wrong at the moment, in one line."""
        self._sink = sink
        self._retry_seconds = retry_seconds
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(backlog)
        self._closing = threading.Event()
        self._lost = 0
        self._opened = False
        # A daemon: one that hangs on a server must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"tracking-{sink.name}", daemon=True)
        self._thread.start()
        self.put(lambda sink: None)  # opens it, so that what is missing is known from the beginning

    def put(self, work: Callable[[Sink], None]) -> None:
        """Hands work in; where too much waits already it is lost."""
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._lost += 1

    def close(self, seconds: float) -> None:
        """Lets it finish what waits, for so long."""
        self._closing.set()
        until = time.monotonic() + seconds
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            self._lost += 1
        self._thread.join(max(until - time.monotonic(), 0.0))
        waiting = self._queue.qsize() + self._lost
        if waiting:
            log.warning("%s: %d entries were not written", self._sink.name, waiting)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if not self._do(work):
                return

    def _do(self, work: Callable[[Sink], None]) -> bool:
        """Does it, again and again; false where the sink is of no use."""
        while True:
            try:
                if not self._opened:
                    self._sink.open()
                    self._opened = True
                work(self._sink)
            except ImportError as error:
                self._tell(f"{self._sink.name} is off: {error} (pip install '{self._sink.requirement}')")
                return False
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._tell(f"{self._sink.name} does not take the metrics: {reason}; trying again")
                if self._closing.wait(self._retry_seconds):
                    return False
            else:
                if self.note:
                    log.info("%s takes the metrics again", self._sink.name)
                self.note = ""
                return True

    def _tell(self, note: str) -> None:
        """Warns once as long as it lasts."""
        if not self.note:
            log.warning("%s", note)
            self.note = note
