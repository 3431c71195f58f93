"""Messages of a stream that are read before there is a place for what they hold."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

T = TypeVar("T")


async def read_ahead(stream: AsyncIterator[bytes], place: Awaitable[T], limit: int) -> tuple[T, AsyncIterator[bytes]]:
    """Waits for a place and reads up to about ``limit`` bytes meanwhile; returns the place, and the whole stream."""
    waiting = asyncio.ensure_future(place)
    early: list[bytes] = []
    size, reading = 0, None
    try:
        # A place that is free is had in the first turn of the loop.
        await asyncio.sleep(0)
        while not waiting.done():
            if reading is None and size < limit:
                reading = asyncio.ensure_future(_next(stream))
            await asyncio.wait([waiting] if reading is None else [waiting, reading], return_when="FIRST_COMPLETED")
            if reading is not None and reading.done():
                if (message := reading.result()) is None:
                    break
                early.append(message)
                size, reading = size + len(message), None
        found = await waiting
    except BaseException:
        waiting.cancel()
        if reading is not None:
            reading.cancel()
        raise
    return found, _joined(early, reading, stream)


async def _next(stream: AsyncIterator[bytes]) -> bytes | None:
    return await anext(stream, None)


async def _joined(
    early: list[bytes], reading: "asyncio.Future[bytes | None] | None", stream: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    early.reverse()
    while early:
        yield early.pop()  # its memory is needed
    if reading is not None and (message := await reading) is not None:
        yield message
    async for message in stream:
        yield message
