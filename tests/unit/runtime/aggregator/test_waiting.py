"""Limits on what one client can occupy: unread messages, calls, and slow streams."""

import asyncio
import queue
from collections.abc import AsyncIterator

import pytest

from isthmus.aggregator.clients.outbox import MOST_MESSAGES, Outbox, drain
from isthmus.aggregator.rpc import pace
from isthmus.aggregator.rpc.call_limit import CallLimit, SupersededError
from isthmus.aggregator.rpc.pace import paced
from isthmus.client.session.session import Incoming
from isthmus.tensors import TruncatedError
from isthmus_contracts.pb import federation_pb2 as pb


def offer(number: int) -> pb.ServerMessage:
    return pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.TRAIN, round=number, model=b"m" * 1000))


def committed(number: int) -> pb.ServerMessage:
    return pb.ServerMessage(committed=pb.Committed(round=number))


WELCOME = pb.ServerMessage(welcome=pb.Welcome(rounds=5))
STOP = pb.ServerMessage(stop=pb.Stop(reason=pb.Stop.COMPLETE))


async def sent(outbox: Outbox) -> list[pb.ServerMessage]:
    return [message async for message in drain(outbox)]


async def test_for_a_client_that_does_not_read_only_the_newest_messages_are_kept() -> None:
    outbox = Outbox()
    outbox.put_nowait(WELCOME)
    for number in range(1, 300):
        outbox.put_nowait(offer(number))
        outbox.put_nowait(committed(number))
    assert outbox.qsize() == 3
    outbox.put_nowait(STOP)
    outbox.put_nowait(None)
    assert await sent(outbox) == [WELCOME, offer(299), committed(299), STOP]


async def test_a_client_that_reads_receives_everything() -> None:
    outbox, heard = Outbox(), []
    reading = drain(outbox)
    for number in (1, 2):
        outbox.put_nowait(offer(number))
        heard.append(await anext(reading))
        outbox.put_nowait(committed(number))
        heard.append(await anext(reading))
    assert heard == [offer(1), committed(1), offer(2), committed(2)]


async def test_an_unread_stream_is_ended() -> None:
    outbox = Outbox()
    for _ in range(10 * MOST_MESSAGES):
        outbox.put_nowait(pb.ServerMessage(reply=pb.PushReply(message="no")))
        assert outbox.qsize() <= MOST_MESSAGES
    assert len(await sent(outbox)) < MOST_MESSAGES


def test_a_script_that_is_busy_finds_the_newest_offer_only() -> None:
    incoming = Incoming()
    for number in range(300):
        incoming.put(committed(number))
        incoming.put(offer(number))
    incoming.put(STOP)
    found = []
    with pytest.raises(queue.Empty):
        while True:
            found.append(incoming.get_nowait())
    assert found == [committed(299), offer(299), STOP]


async def test_a_newer_call_of_a_client_ends_the_older() -> None:
    calls, go = CallLimit(), asyncio.Event()

    async def work(result: str) -> str:
        await go.wait()
        return result

    older = asyncio.create_task(calls.run("a", work("older")))
    other = asyncio.create_task(calls.run("b", work("another client's")))
    await asyncio.sleep(0)
    newer = asyncio.create_task(calls.run("a", work("newer")))
    with pytest.raises(SupersededError, match="a newer call of this client"):
        await older
    go.set()
    assert (await newer, await other) == ("newer", "another client's")
    assert not calls._tasks


async def test_a_client_that_disconnects_is_not_superseded() -> None:
    calls = CallLimit()
    call = asyncio.create_task(calls.run("a", asyncio.sleep(3600)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not calls._tasks
    two = [asyncio.create_task(calls.run("a", asyncio.sleep(3600), most=2)) for _ in range(3)]
    with pytest.raises(SupersededError):
        await two[0]
    assert not two[1].done() and not two[2].done()
    for task in two[1:]:
        task.cancel()
    await asyncio.gather(*two, return_exceptions=True)


async def test_a_stream_that_trickles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE", 0.2)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    received = 0
    with pytest.raises(TruncatedError, match="less than 8 KiB a second"):
        async for message in paced(trickle()):
            received += len(message)
            assert received < 10_000


async def test_time_in_which_the_aggregator_does_not_wait_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE", 0.5)

    async def prompt() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 100

    received = []
    async for message in paced(prompt()):
        received.append(message)
        await asyncio.sleep(0.2)  # the aggregator is busy
    assert len(received) == 5
