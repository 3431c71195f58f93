"""What the aggregator says, in the protocol's messages."""

from collections.abc import AsyncIterator

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.outbox import Outbox
from .compression import Compression
from .global_model import GlobalModel

INITIALIZE = pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.INITIALIZE))


def welcome(heartbeat_seconds: float, rounds: int, instance: str) -> pb.ServerMessage:
    """The answer to a hello."""
    return pb.ServerMessage(
        welcome=pb.Welcome(heartbeat_seconds=heartbeat_seconds, rounds=rounds, instance=instance, takes_updates=True)
    )


def train(spec: FederatedJobSpec, round_number: int, base: GlobalModel, compression: Compression) -> pb.ServerMessage:
    """An offer to train."""
    return pb.ServerMessage(
        offer=pb.Offer(
            kind=pb.Offer.TRAIN,
            round=round_number,
            base_round=base.round,
            base_digest=base.digest,
            config=spec.task.config_of(round_number),
            algorithm=spec.strategy.algorithm,
            parameters={name: repr(value) for name, value in spec.strategy.values.items()},
            codecs=compression.upload.names,
            model_codecs=compression.download.names,
            folds_late=spec.folds_late,
            model=base.inline,
        )
    )


def evaluate(model: GlobalModel, compression: Compression) -> pb.ServerMessage:
    """An offer to evaluate only."""
    return pb.ServerMessage(
        offer=pb.Offer(
            kind=pb.Offer.EVALUATE,
            base_round=model.round,
            base_digest=model.digest,
            model_codecs=compression.download.names,
            model=model.inline,
        )
    )


def committed(round_number: int) -> pb.ServerMessage:
    """A round's checkpoint is durable."""
    return pb.ServerMessage(committed=pb.Committed(round=round_number))


async def spoken(outbox: Outbox) -> AsyncIterator[pb.ServerMessage]:
    """What is queued for a client, until ``None``; but for a commit that the next message, an offer to train on top of
    it, tells as well: a client forgets its update then, too."""
    message = await outbox.get()
    while message is not None:
        if not message.HasField("committed"):
            yield message
            message = await outbox.get()
            continue
        alone = outbox.empty()
        following = None if alone else outbox.get_nowait()
        if following is None or following.offer.kind != pb.Offer.TRAIN:
            yield message
        message = await outbox.get() if alone else following


def stop(reason: "pb.Stop.Reason.ValueType", message: str) -> pb.ServerMessage:
    """The client's part is over."""
    return pb.ServerMessage(stop=pb.Stop(reason=reason, message=message))


def reply(verdict: "pb.PushReply.Verdict.ValueType", message: str, round_number: int = 0) -> pb.PushReply:
    """The answer to an update; with ACCEPTED goes the round that it counts in."""
    return pb.PushReply(verdict=verdict, message=message, round=round_number)
