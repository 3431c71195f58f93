"""Read-ahead of a stream that waits for a slot."""

import asyncio
from collections.abc import AsyncIterator, Awaitable

import pytest

from isthmus.aggregator.rpc.readahead import read_ahead

MESSAGES = [bytes([number]) * 100 for number in range(10)]


class Stream:
    """A stream of messages that counts how many were requested."""

    def __init__(self, fails_at: int = -1) -> None:
        self.read = 0
        self._fails_at = fails_at

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number, message in enumerate(MESSAGES):
            await asyncio.sleep(0)
            if number == self._fails_at:
                raise ConnectionError
            self.read += 1
            yield message


async def _at_once() -> str:
    return "place"


@pytest.mark.parametrize("limit", [1, 350, 10_000])
@pytest.mark.parametrize("waits", [True, False])
def test_the_stream_is_complete_and_read_ahead_is_limited(limit: int, waits: bool) -> None:
    async def run() -> None:
        stream = Stream()
        place: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        awaited: Awaitable[str] = place if waits else _at_once()
        reading = asyncio.create_task(read_ahead(aiter(stream), awaited, limit))
        for _ in range(100):
            await asyncio.sleep(0)
        assert stream.read <= -(-limit // 100)
        if waits:
            assert not reading.done()
            place.set_result("place")
        found, rest = await asyncio.wait_for(reading, 30)
        assert found == "place"
        assert [message async for message in rest] == MESSAGES

    asyncio.run(run())


def test_a_broken_stream_releases_its_slot() -> None:
    async def run() -> None:
        place: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        with pytest.raises(ConnectionError):
            await read_ahead(aiter(Stream(fails_at=2)), place, 10_000)
        assert place.cancelled()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_stream_that_breaks_later_raises_where_it_is_read() -> None:
    async def run() -> None:
        _, rest = await read_ahead(aiter(Stream(fails_at=2)), _at_once(), 10_000)
        with pytest.raises(ConnectionError):
            async for _ in rest:
                pass

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_client_that_disconnects_releases_its_slot() -> None:
    async def run() -> None:
        place: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(read_ahead(aiter(Stream()), place, 200))
        for _ in range(20):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert place.cancelled()

    asyncio.run(asyncio.wait_for(run(), 30))
