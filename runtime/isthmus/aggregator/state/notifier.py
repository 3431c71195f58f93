"""Change notification for waiters on one event loop."""

import asyncio
import time
from collections.abc import AsyncIterator

# Shortest time between two notifications of a listener. Seconds.
_PACE = 0.1


class Notifier:
    """Notification of one waiter, and of any number of listeners, that something has changed."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._listeners: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Wake the waiter and all listeners."""
        self._changed.set()
        self.notify_listeners()

    def notify_listeners(self) -> None:
        """Wake the listeners only."""
        for listener in self._listeners:
            listener.set()

    async def wait(self, until: float | None = None) -> None:
        """Wait for a notification since the last return, or until the given time (monotonic seconds)."""
        timeout = None if until is None else max(until - time.monotonic(), 0.01)
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def listen(self) -> AsyncIterator[None]:
        """Yield at once, and then after changes. Changes in quick succession are reported together."""
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
