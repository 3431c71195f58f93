"""Interface of tracking sinks, and the thread that isolates their failures."""

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

# Longest queue of a sink; further entries are dropped.
_BACKLOG = 1000
_RETRY_SECONDS = 5.0


class Sink(ABC):
    """Receiver of a run's numbers. All calls come from one thread; they may block or raise, and are then repeated."""

    name: str
    requirement: str
    """Package to install."""

    @abstractmethod
    def open(self) -> None:
        """Import the library and connect. Raise ``ImportError`` if it is not installed."""

    @abstractmethod
    def write(self, round_number: int, time: float, values: Mapping[str, float]) -> None:
        """Write the numbers of a round. ``time``: seconds since the epoch."""

    @abstractmethod
    def finish(self, succeeded: bool, tags: Mapping[str, str]) -> None:
        """End the run. ``tags``: properties of the final model."""


class Worker:
    """Queue of one sink, served by a thread. The caller never waits."""

    def __init__(self, sink: Sink, backlog: int = _BACKLOG, retry_seconds: float = _RETRY_SECONDS) -> None:
        self.note = ""
        """Current problem, in one line; empty if there is none."""
        self._sink = sink
        self._retry_seconds = retry_seconds
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(backlog)
        self._closing = threading.Event()
        self._lost = 0
        self._opened = False
        # A daemon thread: one that hangs on a server must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracking-{sink.name}", daemon=True)
        self._thread.start()
        self.put(lambda sink: None)  # opens the sink, so that problems are known from the beginning

    def put(self, work: Callable[[Sink], None]) -> None:
        """Queue work; drop it if the queue is full."""
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._lost += 1

    def close(self, seconds: float) -> None:
        """Wait for queued work, for at most this time."""
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
        """Do the work, with retries; return false if the sink cannot be used."""
        while True:
            try:
                if not self._opened:
                    self._sink.open()
                    self._opened = True
                work(self._sink)
            except ImportError as error:
                self._warn_once(f"{self._sink.name} is off: {error} (pip install '{self._sink.requirement}')")
                return False
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._warn_once(f"{self._sink.name} does not accept metrics: {reason}; trying again")
                if self._closing.wait(self._retry_seconds):
                    return False
            else:
                if self.note:
                    log.info("%s accepts metrics again", self._sink.name)
                self.note = ""
                return True

    def _warn_once(self, note: str) -> None:
        """Log a problem once while it lasts."""
        if not self.note:
            log.warning("%s", note)
            self.note = note
