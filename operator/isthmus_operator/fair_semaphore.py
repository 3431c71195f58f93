"""A semaphore that is shared fairly between groups (namespaces), with slots that are released during remote calls."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

OVERFLOW = 4
"""A group without a slot gets one even if all are taken, up to this multiple of the semaphore's size."""

Waiting = deque[asyncio.Future[None]]


class FairSemaphore:
    """A semaphore of ``size`` slots.

    Waiting groups take turns. A group that holds no slot need not wait for the others (up to ``OVERFLOW`` times the
    size), so a slow namespace cannot block another one.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._most = OVERFLOW * size
        self._taken: dict[Hashable, int] = {}
        self._total = 0
        self._waiting: OrderedDict[Hashable, Waiting] = OrderedDict()

    @property
    def taken(self) -> int:
        """The number of slots in use."""
        return self._total

    async def acquire(self, group: Hashable) -> None:
        """Wait for a slot."""
        if not self._waiting.get(group) and (self._spare(group) or (self._total < self._size and not self._waiting)):
            self._take(group)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(group)  # it was granted at the same moment
            else:
                self._forget(group, future)
            raise

    def release(self, group: Hashable) -> None:
        """Return a slot."""
        left = self._taken[group] - 1
        if left:
            self._taken[group] = left
        else:
            del self._taken[group]
        self._total -= 1
        if not left and self._waiting.get(group) and self._spare(group):
            self._give(group)
        while self._waiting and self._total < self._size:
            self._give(next(iter(self._waiting)))

    def _spare(self, group: Hashable) -> bool:
        return group not in self._taken and self._total < self._most

    def _take(self, group: Hashable) -> None:
        self._taken[group] = self._taken.get(group, 0) + 1
        self._total += 1

    def _give(self, group: Hashable) -> None:
        waiting = self._waiting[group]
        future = waiting.popleft()
        if waiting:
            self._waiting.move_to_end(group)
        else:
            del self._waiting[group]
        self._take(group)
        future.set_result(None)

    def _forget(self, group: Hashable, future: "asyncio.Future[None]") -> None:
        waiting = self._waiting.get(group)
        if waiting is not None and future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._waiting[group]


@dataclass(eq=False)
class Slot:
    """A slot held by one reconciliation, which can be released for a while."""

    semaphore: FairSemaphore
    group: Hashable
    held: bool = False
    suspensions: int = 0  # remote calls in progress for which it is released

    async def acquire(self) -> None:
        """Wait until the slot is held."""
        await self.semaphore.acquire(self.group)
        self.held = True

    def release(self) -> None:
        """Return the slot if it is held."""
        if self.held:
            self.held = False
            self.semaphore.release(self.group)


CURRENT_SLOT: ContextVar[Slot | None] = ContextVar("slot", default=None)
"""The slot of the current reconciliation."""


@asynccontextmanager
async def slot_released() -> AsyncIterator[None]:
    """Release the current slot during a call to a remote party, which may never answer."""
    slot = CURRENT_SLOT.get()
    if slot is None:
        yield
        return
    slot.suspensions += 1
    slot.release()
    try:
        yield
    except asyncio.CancelledError:
        slot.suspensions -= 1
        raise  # the reconciliation ends, so it needs no slot
    except BaseException:
        await _reacquire(slot)
        raise
    else:
        await _reacquire(slot)


async def _reacquire(slot: Slot) -> None:
    slot.suspensions -= 1
    # Only the last of several concurrent calls reacquires it.
    if not slot.suspensions and not slot.held:
        await slot.acquire()
