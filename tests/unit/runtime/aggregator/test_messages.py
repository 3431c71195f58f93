"""Messages that are sent from a client's queue."""

import asyncio

from isthmus.aggregator.clients.outbox import drain
from isthmus.aggregator.model import messages
from isthmus_contracts.pb import federation_pb2 as pb

COMMITTED = messages.committed(3)
TRAIN = pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.TRAIN, round=4, base_round=3))
EVALUATE = pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.EVALUATE, base_round=3))
STOP = messages.stop(pb.Stop.COMPLETE, "")


async def sent(*queued: pb.ServerMessage) -> list[pb.ServerMessage]:
    outbox: asyncio.Queue[pb.ServerMessage | None] = asyncio.Queue()
    for message in (*queued, None):
        outbox.put_nowait(message)
    async with asyncio.timeout(60):
        return [message async for message in drain(outbox)]


async def test_an_offer_to_train_replaces_the_commit_before_it() -> None:
    assert await sent(COMMITTED, TRAIN) == [TRAIN]


async def test_a_commit_is_sent_before_other_messages_and_alone() -> None:
    for queued in ([COMMITTED], [COMMITTED, EVALUATE], [COMMITTED, COMMITTED, STOP], [TRAIN, COMMITTED]):
        assert await sent(*queued) == queued
