"""A thread of low priority for work that is needed only once the script has trained."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
# Increment of the scheduler's nice value: training goes first. Linux counts it for each thread.
_NICENESS = 10


class BackgroundWork:
    """One daemon thread, started with the first job, that does jobs in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Queue a job; return the future of its result."""
        future: Future[T] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(work)
        return future

    def close(self, timeout: float) -> None:
        """End the thread after the job in progress; wait for it up to ``timeout`` seconds."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout)

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            native: Any = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, native, os.getpriority(os.PRIO_PROCESS, native) + _NICENESS)
        while (job := self._jobs.get()) is not None:
            job()
            del job  # its memory must not be held while the thread waits
