"""Messages of the federation protocol that the aggregator sends."""

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from .compression import Compression
from .global_model import GlobalModel

INITIALIZE = pb.ServerMessage(offer=pb.Offer(kind=pb.Offer.INITIALIZE))


def welcome(heartbeat_seconds: float, rounds: int, instance: str) -> pb.ServerMessage:
    """Return the reply to a hello."""
    return pb.ServerMessage(
        welcome=pb.Welcome(heartbeat_seconds=heartbeat_seconds, rounds=rounds, instance=instance, takes_updates=True)
    )


def parameters(spec: FederatedJobSpec) -> dict[str, str]:
    """Return the strategy's parameters as clients get them."""
    return {name: repr(value) for name, value in spec.strategy.values.items()}


def train(spec: FederatedJobSpec, round_number: int, base: GlobalModel, compression: Compression) -> pb.ServerMessage:
    """Return an offer to train."""
    return pb.ServerMessage(
        offer=pb.Offer(
            kind=pb.Offer.TRAIN,
            round=round_number,
            base_round=base.round,
            base_digest=base.digest,
            config=spec.task.config_of(round_number),
            algorithm=spec.strategy.algorithm,
            parameters=parameters(spec),
            codecs=compression.upload.names,
            model_codecs=compression.download.names,
            folds_late=spec.folds_late,
            model=base.inline,
        )
    )


def evaluate(model: GlobalModel, compression: Compression) -> pb.ServerMessage:
    """Return an offer to evaluate without training."""
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
    """Return the message that a round's checkpoint is durable."""
    return pb.ServerMessage(committed=pb.Committed(round=round_number))


def stop(reason: "pb.Stop.Reason.ValueType", message: str) -> pb.ServerMessage:
    """Return the message that ends a client's part in the job."""
    return pb.ServerMessage(stop=pb.Stop(reason=reason, message=message))


def reply(verdict: "pb.PushReply.Verdict.ValueType", message: str, round_number: int = 0) -> pb.PushReply:
    """Return the reply to an update. ``round_number``: the round in which an accepted one counts."""
    return pb.PushReply(verdict=verdict, message=message, round=round_number)
