"""Moving tensors between a client and its aggregator."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import grpc

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ...codecs import CodecError, Decoder, Encoded
from ...framing import receive_model, update_messages
from ...tensors import Reception, State, TransferError, chunk_bytes, chunks_of, specs_of
from ...views import View
from ..errors import FederationError
from .compression import Compression
from .session import GIVE_UP_AFTER, Session, too_large

log = logging.getLogger("isthmus")

T = TypeVar("T")
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 5.0
# A process that was told to stop has a grace period, 30 s in Kubernetes: it must not use it up here.
_PATIENCE_WHEN_STOPPING = 10.0
# Worth another try: the aggregator restarts, the network hiccups, a stream was cut or damaged.
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class OutdatedError(Exception):
    """The aggregator has moved on: what was asked for is no longer wanted or no longer there."""


@dataclass(frozen=True)
class FinishedUpdate:
    """A client's finished work. It is kept until the round is committed, so it never has to be done again."""

    round: int
    base_digest: str
    num_examples: int
    metrics: dict[str, float]
    tensors: State | Encoded
    buffers: list[str] = field(default_factory=list)
    """Names of those that no optimizer trains."""
    scalars: dict[str, float] = field(default_factory=dict)
    """What the strategy wants to know of the training."""
    remembered: State | None = None
    """What the correction keeps for the next round, once this update is accepted."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: how long the work took."""
    views: Sequence[View] = ()
    """The names for which one of ``tensors`` travels."""
    frozen: Sequence[str] = ()
    """Of the initial weights: names of parameters that require no gradient."""


def pull(
    session: Session,
    offer: pb.Offer,
    compression: Compression,
    require_fitting: Callable[[Iterable[pb.TensorSpec]], None],
) -> State:
    """The global model that an offer names, or carries. Raises :class:`OutdatedError` or :class:`FederationError`.

    ``require_fitting`` raises for the specs of a model that the script's cannot load.
    """

    def reception(header: pb.ModelHeader) -> Reception | Decoder:
        require_fitting(header.tensors)
        return compression.reception(header)

    if offer.model:
        try:
            return receive_model((offer.model,), reception)
        except TransferError as error:
            log.warning("the model in an offer cannot be read (%s); pulling it", error)

    def attempt() -> State:
        try:
            return receive_model(session.pull(compression.request(offer)), reception)
        except CodecError:
            compression.distrust()
            raise

    return _persistently(session, "pull", attempt)


def pull_companion(session: Session, offer: pb.Offer) -> State:
    """Return what the strategy sends along with an offer's model. Raises as :func:`pull` does."""
    request = pb.PullRequest(
        job_uid=session.job_uid, round=offer.base_round, digest=offer.base_digest, companion=True
    )  # fmt: skip
    return _persistently(
        session, "pull", lambda: receive_model(session.pull(request), lambda header: Reception(header.tensors))
    )


def push(session: Session, update: FinishedUpdate) -> pb.PushReply:
    """Hands an update in; sends it again until it is answered. Raises :class:`FederationError`."""
    tensors = update.tensors
    header = pb.UpdateHeader(
        job_uid=session.job_uid,
        pool=session.context.pool,
        index=session.context.index,
        attempt=session.context.attempt,
        instance=session.instance,
        round=update.round,
        base_digest=update.base_digest,
        num_examples=update.num_examples,
        metrics=update.metrics,
        codecs=tensors.chain.names if isinstance(tensors, Encoded) else (),
        tensors=tensors.specs if isinstance(tensors, Encoded) else specs_of(tensors),
        buffers=update.buffers,
        scalars=update.scalars,
        seconds=update.seconds,
        views=[view.message() for view in update.views],
        frozen=update.frozen,
    )
    checksum = tensors.checksum if isinstance(tensors, Encoded) else ""
    size = chunk_bytes(session.context.clients)

    def attempt() -> pb.PushReply:
        data = tensors.chunks if isinstance(tensors, Encoded) else chunks_of(tensors, size)
        messages = update_messages(header, data, checksum)
        first, second = next(messages), next(messages, None)
        return session.push_one(first) if second is None else session.push(chain((first, second), messages))

    try:
        reply = _persistently(session, "push", attempt)
        reply.message = one_line(reply.message)
        return reply
    except OutdatedError as error:
        return pb.PushReply(verdict=pb.PushReply.STALE, message=str(error))


def _persistently(session: Session, what: str, attempt: Callable[[], T]) -> T:
    """Tries until it works, with growing pauses, as long as the aggregator may come back."""
    backoff, since, patience = _FIRST_BACKOFF, time.monotonic(), GIVE_UP_AFTER
    while True:
        try:
            return attempt()
        except TransferError as error:
            problem = str(error)
        except grpc.RpcError as error:
            code, problem = error.code(), one_line(error.details() or "")
            if code == grpc.StatusCode.FAILED_PRECONDITION:
                raise OutdatedError(problem) from None
            if (hopeless := too_large(what, error)) is not None:
                raise hopeless from None
            if code not in _TRANSIENT:
                raise FederationError(f"{what}: the aggregator at {session.endpoint} refuses us: {problem}") from None
        if session.over.is_set():
            raise OutdatedError("the aggregator has ended our part")
        if session.stopping.is_set() and patience == GIVE_UP_AFTER:
            since, patience = time.monotonic(), _PATIENCE_WHEN_STOPPING
        if time.monotonic() - since > patience:
            raise FederationError(f"{what}: the aggregator at {session.endpoint} does not answer: {problem}")
        log.warning("%s failed (%s); trying again", what, problem)
        time.sleep(backoff)
        backoff = min(backoff * 2, _LONGEST_BACKOFF)
