"""Transfer of models and updates between a client and its aggregator, with retries."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TypeVar

import grpc

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.process import backoff
from isthmus_contracts.text import one_line

from ...codecs import CodecError, Decoder, Encoded
from ...framing import receive_model, update_messages
from ...secure_aggregation.encoding.scalars import SCALARS
from ...secure_aggregation.layout import SLOPE
from ...tensors import RawDecoder, State, TransferError, bytes_view, chunk_bytes, chunks_of, specs_of
from ...views import View
from ..errors import FederationError
from .audit import Results, What
from .compression import ClientCompression
from .secure.held_update import HeldUpdate
from .secure.participant import Masked
from .session import GIVE_UP_AFTER, Session, too_large

log = logging.getLogger("isthmus")

T = TypeVar("T")
_numbers = count(1)
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 5.0
# A process that was told to stop has a grace period, 30 s in Kubernetes, which retries must not use up. Seconds.
_TIMEOUT_WHEN_STOPPING = 10.0
# Errors to retry: the aggregator restarts, the network fails for a moment, a stream was cut or damaged.
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
    """The aggregator has moved on: the model or update is no longer available or no longer wanted."""


@dataclass(frozen=True)
class FinishedUpdate:
    """A client's finished update. It is kept until the round commits, so that it can be resent without retraining."""

    round: int
    base_digest: str
    num_examples: int
    metrics: dict[str, float]
    tensors: State | Encoded
    buffers: list[str] = field(default_factory=list)
    """Names of the tensors that no optimizer trains."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Numbers about the training that the strategy requires."""
    updated_state: State | None = None
    """The correction's state for the next round, to be kept once this update is accepted."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each stage of the work. Seconds."""
    views: Sequence[View] = ()
    """Names that are views of one of ``tensors``, which is sent in their place."""
    frozen: Sequence[str] = ()
    """For initial weights: names of the parameters that require no gradient."""
    held: HeldUpdate | None = None
    """With secure aggregation: the result before masking, whose tensors are ``tensors``. It leaves only under masks."""
    number: int = field(default_factory=lambda: next(_numbers))
    """Number of the update in this process."""

    @property
    def secure_attempt(self) -> int | None:
        """The offer's, or ``None`` for an update that is sent in clear."""
        return None if self.held is None else self.held.work.attempt


def pull(
    session: Session,
    offer: pb.Offer,
    compression: ClientCompression,
    require_fitting: Callable[[Iterable[pb.TensorSpec]], None],
) -> State:
    """Return the global model that an offer names or contains.

    ``require_fitting`` is called with the model's specs, and raises if the script's model cannot load them.
    Raises :class:`OutdatedError` or :class:`FederationError`.
    """

    def reception(header: pb.ModelHeader) -> RawDecoder | Decoder:
        require_fitting(header.tensors)
        return compression.reception(header)

    if offer.model:
        try:
            return receive_model((offer.model,), reception)
        except TransferError as error:
            log.warning("cannot read the model in an offer (%s); pulling it", error)

    def attempt() -> State:
        try:
            return receive_model(session.pull(compression.request(offer)), reception)
        except CodecError:
            compression.request_uncompressed()
            raise

    return _retry(session, "pull", attempt)


def pull_companion(session: Session, offer: pb.Offer) -> State:
    """Return the auxiliary tensors that the strategy sends with an offer's model. Raises as :func:`pull` does."""
    request = pb.PullRequest(
        job_uid=session.job_uid, round=offer.base_round, digest=offer.base_digest, companion=True
    )  # fmt: skip
    return _retry(
        session, "pull", lambda: receive_model(session.pull(request), lambda header: RawDecoder(header.tensors))
    )


def push(session: Session, update: FinishedUpdate, masked: Masked | None = None) -> pb.PushReply:
    """Send an update, and resend it until the aggregator replies. Raises :class:`FederationError`.

    ``masked``: what is sent in place of the tensors of a held update. The site's rules are applied, and the site's
    audit log is written, before anything is sent.
    """
    if (masked is None) != (update.held is None):
        raise AssertionError("a held update is sent under masks, and no other one")
    tensors = masked.tensors if masked is not None else update.tensors
    _admit(session, update, masked)
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
        secure_incarnation=masked.incarnation if masked is not None else 0,
    )
    checksum = tensors.checksum if isinstance(tensors, Encoded) else ""
    size = chunk_bytes(session.context.clients)

    def attempt() -> pb.PushReply:
        data = tensors.chunks if isinstance(tensors, Encoded) else chunks_of(tensors, size)
        messages = update_messages(header, data, checksum)
        first, second = next(messages), next(messages, None)
        return session.push_one(first) if second is None else session.push(chain((first, second), messages))

    try:
        reply = _retry(session, "push", attempt)
        reply.message = one_line(reply.message)
        return reply
    except OutdatedError as error:
        return pb.PushReply(verdict=pb.PushReply.STALE, message=str(error))


def _admit(session: Session, update: FinishedUpdate, masked: Masked | None) -> None:
    """Apply the site's rules to an update, and record it. Raises :class:`FederationError`."""
    tensors = masked.tensors if masked is not None else update.tensors
    if isinstance(tensors, Encoded):
        names, size = [spec.name for spec in tensors.specs], tensors.size
        data: Iterable[bytes | memoryview] = tensors.chunks
    else:
        names, size = list(tensors), sum(tensor.nbytes for tensor in tensors.values())
        data = (bytes_view(tensor) for tensor in tensors.values())
    if masked is not None:
        names = [name.removeprefix(SLOPE) for name in names if name != SCALARS]
    if update.held is not None and update.held.work.purpose == sa.SecureBegin.EVALUATE:
        what: What = "evaluation"
    else:
        what = "update" if update.round else "initial-weights"
    incarnation = masked.incarnation if masked is not None else 0
    results = Results(what, update.round, size, session.audit.digest(data), incarnation)
    session.site.admit(results, [*names, *(view.name for view in update.views)], update.number)


def send_evaluation(session: Session, evaluation: pb.Evaluation) -> None:
    """Send an evaluation in clear, and record it in the site's audit log."""
    data = evaluation.SerializeToString(deterministic=True)
    session.audit.sent(Results("evaluation", evaluation.model_round, len(data), session.audit.digest([data])))
    session.send(pb.ClientMessage(evaluation=evaluation))


def _retry(session: Session, what: str, attempt: Callable[[], T]) -> T:
    """Repeat an attempt, with exponential back-off, until it succeeds or the aggregator has not answered for too long.

    The limit is ``GIVE_UP_AFTER`` seconds, and less for a process that was told to stop.
    """
    failures, since, timeout = 0, time.monotonic(), GIVE_UP_AFTER
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
                raise FederationError(
                    f"{what}: the aggregator at {session.endpoint} refuses this client: {problem}"
                ) from None
        if session.over.is_set():
            raise OutdatedError("the aggregator has ended this client's participation")
        if session.stopping.is_set() and timeout == GIVE_UP_AFTER:
            since, timeout = time.monotonic(), _TIMEOUT_WHEN_STOPPING
        if time.monotonic() - since > timeout:
            raise FederationError(f"{what}: the aggregator at {session.endpoint} does not answer: {problem}")
        log.warning("%s failed (%s); trying again", what, problem)
        failures += 1
        time.sleep(backoff.delay(failures, _FIRST_BACKOFF, _LONGEST_BACKOFF))
