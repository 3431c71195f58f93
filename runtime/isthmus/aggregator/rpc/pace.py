"""The least rate of a stream: a client that sends a byte a second would keep its place from others for ever, and one
that does not read the model that it pulls would keep that model, on the disk too, long after its round."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from ...tensors import TruncatedError

LEAST_BYTES_PER_SECOND = 8 << 10
"""A slower stream is ended once it is :data:`PATIENCE` seconds behind."""
PATIENCE = 180.0
"""Longer than a message of a megabyte takes at that rate. Only seconds in which the aggregator waits count."""


async def paced(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a stream's messages. Raises :class:`TruncatedError` where they come too slowly."""
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
        del message  # who does not ask for the next one shall not keep this one
        yield handed_on.pop()


async def send_paced(messages: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
    """Write a stream's messages. Raises :class:`TruncatedError` where the peer reads them too slowly."""
    loop, left = asyncio.get_running_loop(), PATIENCE
    async for message in messages:
        started = loop.time()
        try:
            async with asyncio.timeout(left):
                await write(message)
        except TimeoutError:
            raise TruncatedError(f"the client reads less than {LEAST_BYTES_PER_SECOND >> 10} KiB a second") from None
        left += started - loop.time() + len(message) / LEAST_BYTES_PER_SECOND
