"""Turns: how many may do something at once, shared fairly between groups (namespaces), and given up while one waits
for a party outside of the cluster."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

OVERFLOW = 4
"""A group that has nothing under way gets a turn even when all are taken, up to so many times their number."""

Waiting = deque[asyncio.Future[None]]


class FairSemaphore:
    """At most ``size`` at once. Groups that wait take turns, and one that has none under way need not wait for the
    others: however slow everything of one namespace is, another one's goes on."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._most = OVERFLOW * size
        self._taken: dict[Hashable, int] = {}
        self._total = 0
        self._waiting: OrderedDict[Hashable, Waiting] = OrderedDict()

    @property
    def taken(self) -> int:
        """Turns that are under way."""
        return self._total

    async def acquire(self, group: Hashable) -> None:
        """Waits for a turn."""
        if not self._waiting.get(group) and (self._spare(group) or (self._total < self._size and not self._waiting)):
            self._take(group)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(group)  # it was given at the same moment
            else:
                self._forget(group, future)
            raise

    def release(self, group: Hashable) -> None:
        """Ends a turn."""
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
    """One turn of a look, which may be given up for a while."""

    semaphore: FairSemaphore
    group: Hashable
    held: bool = False
    suspensions: int = 0  # calls under way for which it is given up

    async def acquire(self) -> None:
        """Waits for it."""
        await self.semaphore.acquire(self.group)
        self.held = True

    def release(self) -> None:
        """Lets others have it."""
        if self.held:
            self.held = False
            self.semaphore.release(self.group)


CURRENT_SLOT: ContextVar[Slot | None] = ContextVar("turn", default=None)
"""The turn of the look that is under way."""


@asynccontextmanager
async def slot_released() -> AsyncIterator[None]:
    """Gives the look's turn up while it waits for a remote party, which may never answer."""
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
        raise  # the look ends: no turn is needed any more
    except BaseException:
        await _reacquire(slot)
        raise
    else:
        await _reacquire(slot)


async def _reacquire(slot: Slot) -> None:
    slot.suspensions -= 1
    # The last of several calls side by side takes it again.
    if not slot.suspensions and not slot.held:
        await slot.acquire()
