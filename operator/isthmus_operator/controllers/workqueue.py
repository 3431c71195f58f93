"""A queue of keys. A key is handled by one worker at a time, and again later if requested."""

import asyncio
import heapq
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from isthmus_contracts.process import asyncio_tasks, backoff

from ..effects.kube import KubeError
from ..fair_semaphore import CURRENT_SLOT, FairSemaphore, Slot
from ..metrics import RECONCILE_ERRORS

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

_FIRST_RETRY = 0.5  # seconds after an error; doubled each time
_LONGEST_RETRY = 60.0
_SLACK = 64  # outdated entries that are tolerated in the heap


class WorkQueue(Generic[K]):
    """Work queue that calls ``handle`` for each due key; the result is the delay until it is due again."""

    def __init__(
        self,
        handle: Callable[[K], Awaitable[float | None]],
        *,
        workers: int,
        group: Callable[[K], Hashable] = lambda _: "",
        interval: float = 0.2,
        timeout: float = 600.0,
    ) -> None:
        """``group``: group of a key, between which workers are shared fairly. ``interval``, ``timeout``: seconds."""
        self._handle = handle
        self._group = group
        self._slots = FairSemaphore(workers)
        self._interval = interval
        self._timeout = timeout
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._sequence = 0
        self._taken: dict[K, float] = {}  # keys that wait for a worker, and when each began to wait
        self._running: dict[K, float] = {}
        self._finished: dict[K, float] = {}
        self._errors: dict[K, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def add(self, key: K, delay: float = 0.0) -> None:
        """Schedule a key after a delay in seconds, unless it is due earlier."""
        due = time.monotonic() + delay
        # A key that changes all the time must not starve the others.
        due = max(due, self._finished.get(key, 0.0) + self._interval)
        if self._due.get(key, float("inf")) <= due:
            return
        self._due[key] = due
        self._sequence += 1
        heapq.heappush(self._heap, (due, self._sequence, key))
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            # Outdated entries leave the heap when they are due, which may be in ten minutes.
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._changed.set()

    def count(self) -> int:
        """Return the number of keys about which anything is stored."""
        return max(len(self._due), len(self._taken) + len(self._running), len(self._finished), len(self._errors))

    def oldest(self) -> float:
        """Return the age in seconds of the longest running call."""
        now = time.monotonic()
        return max((now - started for started in self._running.values()), default=0.0)

    def waiting(self) -> int:
        """Return the number of due keys that wait for a worker."""
        return len(self._taken)

    def busy(self) -> int:
        """Return the number of busy workers, without those that wait for a remote party."""
        return self._slots.taken

    def waited(self) -> float:
        """Return for how many seconds the first key has waited for a worker."""
        now = time.monotonic()
        return max((now - since for since in list(self._taken.values())), default=0.0)

    async def run(self) -> None:
        """Process keys until cancelled."""
        try:
            while True:
                await self._wait()
                key = self._pop()
                if key is None:
                    continue
                self._taken[key] = time.monotonic()
                task = asyncio.create_task(self._work(key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            await asyncio_tasks.end(self._tasks)

    async def _wait(self) -> None:
        """Wait until a key is due."""
        while True:
            now = time.monotonic()
            self._discard_outdated()
            wait = self._heap[0][0] - now if self._heap else None
            if wait is not None and wait <= 0:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _discard_outdated(self) -> None:
        """Drop heap entries that were replaced, or whose key is being handled."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) == due and key not in self._running and key not in self._taken:
                return
            heapq.heappop(self._heap)

    def _pop(self) -> K | None:
        self._discard_outdated()
        if not self._heap or self._heap[0][0] > time.monotonic():
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        return key

    async def _work(self, key: K) -> None:
        again: float | None
        slot = Slot(self._slots, self._group(key))
        CURRENT_SLOT.set(slot)
        try:
            await slot.acquire()
        finally:
            del self._taken[key]
        self._running[key] = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                again = await self._handle(key)
            self._errors.pop(key, None)
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise
            # Otherwise something inside the call was cancelled, which is an error like any other.
            RECONCILE_ERRORS.inc()
            times = self._errors[key] = self._errors.get(key, 0) + 1
            again = backoff.delay(times, _FIRST_RETRY, _LONGEST_RETRY) * random.uniform(0.8, 1.2)  # noqa: S311
            log.error(
                "%s: %s: %s; again in %.1f s",
                key,
                type(error).__name__,
                error,
                again,
                exc_info=not isinstance(error, KubeError),
            )
        finally:
            slot.release()
            del self._running[key]
        if again is None and key not in self._due:
            self._finished.pop(key, None)
            self._errors.pop(key, None)
            return
        self._finished[key] = time.monotonic()
        # A request made during the call is still due, but its heap entry was dropped.
        asked = self._due.pop(key, None)
        if asked is not None:
            self.add(key, max(0.0, asked - time.monotonic()))
        if again is not None:
            self.add(key, again)
