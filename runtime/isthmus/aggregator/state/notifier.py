"""Tells those who wait on one event loop that something has changed."""

import asyncio
import time
from collections.abc import AsyncIterator

# Listeners hear of changes at most this often. Seconds.
_PACE = 0.1


class Notifier:
    """One waits for the next ring; any number of listeners hear that it rang."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._listeners: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Something has changed."""
        self._rung.set()
        self.notify_listeners()

    def notify_listeners(self) -> None:
        """Something has changed that only listeners care for."""
        for listener in self._listeners:
            listener.set()

    async def wait(self, until: float | None = None) -> None:
        """Returns after a ring since the last return, or at the given time (monotonic seconds)."""
        timeout = None if until is None else max(until - time.monotonic(), 0.01)
        try:
            async with asyncio.timeout(timeout):
                await self._rung.wait()
        except TimeoutError:
            return
        self._rung.clear()

    async def listen(self) -> AsyncIterator[None]:
        """Yields at once, and then after changes, several of which may make one."""
        changed = asyncio.Event()
        self._listeners.add(changed)
        try:
            while True:
                changed.clear()
                yield
                await changed.wait()
                await asyncio.sleep(_PACE)
        finally:
            self._listeners.discard(changed)
