"""Messages of a stream that are read before there is a place for what they hold."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

T = TypeVar("T")


async def read_ahead(stream: AsyncIterator[bytes], place: Awaitable[T], limit: int) -> tuple[T, AsyncIterator[bytes]]:
    """Waits for a place and reads up to about ``limit`` bytes meanwhile; returns the place, and the whole stream."""
    waiting = asyncio.ensure_future(place)
    early: list[bytes] = []
    size = 0
    try:
        # A place that is free is had in the first turn of the loop.
        await asyncio.sleep(0)
        # With a place or without one, there is nothing to be done before the next message is there.
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
        yield early.pop()  # its memory is needed
    async for message in stream:
        yield message
