"""What is queued for a client, and what of it is said."""

import asyncio

from isthmus.aggregator.clients.outbox import drain
from isthmus.aggregator.model import messages
from isthmus_contracts.pb import federation_pb2 as pb

COMMITTED = messages.committed(3)
TRAIN = pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.TRAIN, round=4, base_round=3))
EVALUATE = pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.EVALUATE, base_round=3))
STOP = messages.stop(pb.Stop.COMPLETE, "")


async def said(*queued: pb.ServerMessage) -> list[pb.ServerMessage]:
    outbox: asyncio.Queue[pb.ServerMessage | None] = asyncio.Queue()
    for message in (*queued, None):
        outbox.put_nowait(message)
    async with asyncio.timeout(60):
        return [message async for message in drain(outbox)]


async def test_an_offer_to_train_tells_of_the_commit_before_it() -> None:
    assert await said(COMMITTED, TRAIN) == [TRAIN]


async def test_a_commit_is_told_before_anything_else_and_alone() -> None:
    for queued in ([COMMITTED], [COMMITTED, EVALUATE], [COMMITTED, COMMITTED, STOP], [TRAIN, COMMITTED]):
        assert await said(*queued) == queued
