"""Updates that are being received: how many at a time, and the memory that they lie in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..tensors import State
from .model import GlobalModel
from .tensorfile import SMALL_BYTES

# Updates being received at the same time take at most about this much memory; the others wait, held back by HTTP/2's
# flow control.
RECEPTION_BYTES = 64 << 20
_MAX_RECEPTIONS = 64


class Receptions:
    """A place for each update that is received, with the memory of one that has been folded, if there is any.

    Memory that is used again costs nothing; fresh memory is slower to touch than to fill.
    """

    def __init__(self) -> None:
        self._places: asyncio.Semaphore | None = None
        self._spare: list[State] = []

    @asynccontextmanager
    async def place(self, model: GlobalModel | None) -> AsyncIterator[State]:
        """Waits for a place; yields tensors that nobody needs any more, maybe none."""
        async with self._semaphore(model):
            yield self._spare.pop() if self._spare else {}

    def give_back(self, tensors: State) -> None:
        """Takes tensors that nobody needs any more."""
        if sum(tensor.nbytes for tensor in tensors.values()) > SMALL_BYTES:
            self._spare.append(tensors)

    def clear(self) -> None:
        """Lets go of the memory: there is little more to be received."""
        self._spare.clear()

    def _semaphore(self, model: GlobalModel | None) -> asyncio.Semaphore:
        if self._places is None:
            if model is None:
                return asyncio.Semaphore(1)  # the initial weights: one client is asked
            self._places = asyncio.Semaphore(max(1, min(_MAX_RECEPTIONS, RECEPTION_BYTES // max(model.size, 1))))
        return self._places
