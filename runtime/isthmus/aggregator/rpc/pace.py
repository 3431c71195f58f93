"""Minimum rate of streams.

A client that sent one byte a second would occupy a receive slot for ever. One that did not read the model that it pulls
would keep that model in memory and on disk long after its round.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from ...tensors import TruncatedError

LEAST_BYTES_PER_SECOND = 8 << 10
"""Minimum rate. A slower stream is ended once it is :data:`PATIENCE` seconds behind."""
PATIENCE = 180.0
"""Seconds. More than a message of 1 MB takes at that rate. Only time in which the aggregator waits counts."""


async def paced(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a stream's messages. Raise :class:`TruncatedError` if they arrive too slowly."""
    loop, left = asyncio.get_running_loop(), PATIENCE
    while True:
        started = loop.time()
        try:
            async with asyncio.timeout(left):
                message = await anext(stream, None)
        except TimeoutError:
            raise TruncatedError(f"the stream brings less than {LEAST_BYTES_PER_SECOND >> 10} KiB a second") from None
        if message is None:
            return
        left += started - loop.time() + len(message) / LEAST_BYTES_PER_SECOND
        handed_on = [message]
        del message  # a paused consumer must not keep this one in memory
        yield handed_on.pop()


async def send_paced(messages: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
    """Write a stream's messages. Raise :class:`TruncatedError` if the peer reads them too slowly."""
    loop, left = asyncio.get_running_loop(), PATIENCE
    async for message in messages:
        started = loop.time()
        try:
            async with asyncio.timeout(left):
                await write(message)
        except TimeoutError:
            raise TruncatedError(f"the client reads less than {LEAST_BYTES_PER_SECOND >> 10} KiB a second") from None
        left += started - loop.time() + len(message) / LEAST_BYTES_PER_SECOND
