"""Read-ahead of a stream while its receive slot is awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

T = TypeVar("T")


async def read_ahead(stream: AsyncIterator[bytes], slot: Awaitable[T], limit: int) -> tuple[T, AsyncIterator[bytes]]:
    """Wait for a slot, and read up to about ``limit`` bytes meanwhile; return the slot and the whole stream."""
    waiting = asyncio.ensure_future(slot)
    early: list[bytes] = []
    size = 0
    try:
        # A free slot is available after one event-loop iteration.
        await asyncio.sleep(0)
        # Wait for the next message in any case: even with a slot, nothing can be done before it arrives.
        while not waiting.done() and size < limit and (message := await anext(stream, None)) is not None:
            early.append(message)
            size += len(message)
        found = await waiting
    except BaseException:
        waiting.cancel()
        raise
    return found, _joined(early, stream)


async def _joined(early: list[bytes], stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    early.reverse()
    while early:
        yield early.pop()  # releases its memory
    async for message in stream:
        yield message
