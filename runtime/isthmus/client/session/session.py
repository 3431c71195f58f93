"""The client's connection to its aggregator: one control stream that survives the aggregator's restarts."""

import logging
import os
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc

from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import FederationStub
from isthmus_contracts.process import backoff
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import channel

from ...framing import PULL, PUSH
from ...tensors import CHUNK_BYTES, TransferError
from ..context import Context
from ..errors import FORKED_PROCESS, FederationError
from .audit import AuditLog
from .secure.participant import SecureParticipant
from .site_rules import SiteRules
from .stage_timer import StageTimer

log = logging.getLogger("isthmus")

# An aggregator that is unreachable for this long is given up. Seconds.
GIVE_UP_AFTER = 1800.0
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 5.0
_WARN_EVERY = 15.0
# Bounds of the interval that the aggregator asks for. Seconds.
_SHORTEST_HEARTBEAT, _LONGEST_HEARTBEAT = 1.0, 300.0
# Closing waits at most this long for queued messages, and as long for gRPC's threads. Seconds.
_CLOSE_TIMEOUT = 5.0
# cygrpc's ForkManagedThread runs a function of this name, and Python names threads after it.
_GRPC_THREAD_NAME = "(_run)"
# Errors that a retry does not fix: the aggregator is reachable and rejects this client.
_FATAL = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)


def too_large(what: str, error: grpc.RpcError) -> FederationError | None:
    """Return the error to raise if a call failed because a message exceeds a size limit: a retry would fail too.

    Tensors are cut into small messages, but the header that describes them all is a single one, the first.
    """
    details = one_line(error.details() or "")
    if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or "larger than max" not in details:
        return None
    return FederationError(
        f"{what}: the names of all tensors do not fit a message's header ({details}):"
        " send fewer tensors with isthmus.rounds(..., parameters=...), or shorten their names"
    )


class _Connection:
    """A gRPC channel and the methods that are called through it."""

    def __init__(self, endpoint: str, credentials: Credentials, server_name: str | None) -> None:
        self.credentials = credentials
        self.channel = channel(endpoint, credentials, server_name)
        self.control = FederationStub(self.channel).Control
        # The messages of the methods that transfer tensors are made and read by the framing module.
        self.pull: Callable[[pb.PullRequest], Iterator[bytes]] = self.channel.unary_stream(
            PULL, request_serializer=pb.PullRequest.SerializeToString
        )
        self.push: grpc.StreamUnaryMultiCallable[bytes, pb.PushReply] = self.channel.stream_unary(
            PUSH, response_deserializer=pb.PushReply.FromString
        )
        # A stream of one message is the same on the wire as a unary request, which gRPC sends without a thread.
        push_one: grpc.UnaryUnaryMultiCallable[bytes, pb.PushReply] = self.channel.unary_unary(
            PUSH, response_deserializer=pb.PushReply.FromString
        )
        self.push_one: Callable[[bytes], pb.PushReply] = push_one


class Incoming(queue.Queue["pb.ServerMessage | FederationError"]):
    """Messages of the aggregator that the script's thread has not read yet.

    Of offers, and of commits, only the newest is kept: those of the rounds that a slow client misses, each with a
    model, must not accumulate.
    """

    def _put(self, item: "pb.ServerMessage | FederationError") -> None:
        kind = item.WhichOneof("message") if isinstance(item, pb.ServerMessage) else None
        if kind in ("offer", "committed"):
            for place, older in enumerate(self.queue):
                if isinstance(older, pb.ServerMessage) and older.WhichOneof("message") == kind:
                    del self.queue[place]
                    break
        super()._put(item)

    def overtakes(self, offer: pb.Offer) -> bool:
        """Return whether a message waits that makes the work for an offer pointless: anything but the same offer."""
        with self.mutex:
            return any(not _repeats(offer, item) for item in self.queue)


def _repeats(offer: pb.Offer, item: "pb.ServerMessage | FederationError") -> bool:
    """Return whether an item asks for the same work as an offer, or reports the commit of an earlier round."""
    if isinstance(item, FederationError):
        return False
    if item.WhichOneof("message") == "committed":
        return item.committed.round < offer.round or offer.kind == pb.Offer.EVALUATE
    wanted = (offer.kind, offer.round, offer.base_digest, offer.secure_attempt)
    other = item.offer
    return (other.kind, other.round, other.base_digest, other.secure_attempt) == wanted


class Session:
    """Connection to the aggregator, with a control stream that background threads keep open.

    Messages of the aggregator are queued for the script's thread in :attr:`incoming`.
    """

    def __init__(self, context: Context, evaluates: bool, stopping: threading.Event) -> None:
        environ = os.environ
        self.job_uid = environ.get(identities.ENV_JOB_UID, "")
        self.endpoint = environ[identities.ENV_ENDPOINT]
        self.context = context
        self.instance = uuid.uuid4().hex
        self.incoming = Incoming()
        """Offers, commits and stops, in order of arrival."""
        self.aggregator = ""
        """Id of the aggregator's process to which the session is connected."""
        self.stages = StageTimer()
        self.over = threading.Event()
        """Set once the aggregator has ended this client's participation: it may be gone by now."""
        self.stopping = stopping
        """Set once the process was told to stop."""
        self._directory = Path(environ.get(identities.ENV_TLS_DIR, ""))
        self._server_name = environ.get(identities.ENV_SERVER_NAME)
        try:
            credentials = Credentials.read(self._directory)
        except OSError as error:
            raise FederationError(
                f"cannot read the client's certificate: {error.filename}: {error.strerror}"
                f" ({identities.ENV_TLS_DIR} must name a directory with ca.crt, tls.crt and tls.key)"
            ) from None
        self.audit = AuditLog(self.job_uid, context, environ.get(identities.ENV_AUDIT_DIR, ""))
        self.site = SiteRules(self._directory, self.audit)
        self.secure = SecureParticipant(
            self.job_uid, context, self.instance, self._directory, self.site, self.send, self.incoming.put
        )
        self._earlier_threads = set(threading.enumerate())
        self._connection = _Connection(self.endpoint, credentials, self._server_name)
        self._earlier_connections: list[_Connection] = []
        self._hello = pb.Hello(
            job_uid=self.job_uid,
            pool=context.pool,
            index=context.index,
            attempt=context.attempt,
            instance=self.instance,
            version=version("isthmus"),
            evaluates=evaluates,
        )
        self._outgoing: queue.Queue[pb.ClientMessage | None] = queue.Queue()  # of the current stream
        self._reply_lock = threading.Lock()
        self._takes_updates = False  # on the current stream
        self._awaited: Future[pb.PushReply | None] | None = None  # the reply to an update on the stream; None: no reply
        self._heartbeat_seconds = 10.0
        self._closed = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="isthmus-control", daemon=True)
        self._thread.start()

    def pull(self, request: pb.PullRequest) -> Iterator[bytes]:
        """Request a model; return its serialized messages."""
        return self._connection.pull(request)

    def push_one(self, message: bytes) -> pb.PushReply:
        """Send an update that is a single message: on the control stream, if the aggregator accepts updates there.

        Raises :class:`TransferError` if it should be sent again.
        """
        with self._reply_lock:
            on_stream = self._takes_updates and len(message) <= CHUNK_BYTES
            awaited = self._awaited = Future() if on_stream else None
            if awaited is not None:
                self._outgoing.put(pb.ClientMessage(update=message))
        reply = awaited.result() if awaited is not None else None
        if reply is None:  # the stream broke; the call below shows whether the connection did too
            reply = self._connection.push_one(message)
        if reply.verdict == pb.PushReply.RESEND:
            raise TransferError(reply.message)
        return reply

    def works_on(self, round_number: int, base_digest: str) -> None:
        """Include the round in the next hello, so that a restarted aggregator knows that this client trains it."""
        hello = pb.Hello()
        hello.CopyFrom(self._hello)
        hello.round, hello.base_digest = round_number, base_digest
        self._hello = hello

    def push(self, messages: Iterator[bytes]) -> pb.PushReply:
        """Send an update's messages: the first one, and the others once the aggregator has a buffer for them.

        Sent earlier, they would occupy the aggregator's memory: flow control admits megabytes for each client.
        """
        call: Future[Any] = Future()

        def in_turn() -> Iterator[bytes]:
            yield next(messages)
            call.result().initial_metadata()
            yield from messages

        pushing: Any = self._connection.push.future(in_turn())
        call.set_result(pushing)
        try:
            reply: pb.PushReply = pushing.result()
        except grpc.FutureCancelledError:
            raise pushing from None  # the call itself is the error that holds the reason
        return reply

    def send(self, message: pb.ClientMessage) -> None:
        """Queue a message for the control stream.

        It is lost if the stream breaks; the aggregator asks again after the next hello for anything that matters.
        """
        self._outgoing.put(message)

    def close(self) -> None:
        """Send the queued messages, and close the stream and its connections."""
        if not self._closed.is_set():
            self._closed.set()
            self._outgoing.put(None)
            self._thread.join(timeout=_CLOSE_TIMEOUT)
            self.secure.close(_CLOSE_TIMEOUT)
            for connection in (*self._earlier_connections, self._connection):
                connection.channel.close()
            self._join_grpc_threads()

    def abandon(self) -> None:
        """Give the session up in a fork, which has none of its threads; its locks may never be released."""
        self._closed = threading.Event()
        self._closed.set()
        self._abandoned = True

    def require_own_process(self) -> None:
        """Raise :class:`FederationError` in a fork of the session's process."""
        if self._abandoned:
            raise FederationError(FORKED_PROCESS)

    def _join_grpc_threads(self) -> None:
        """Wait for gRPC's own threads: one that runs while the interpreter shuts down aborts the process."""
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for thread in threading.enumerate():
            if thread not in self._earlier_threads and thread.daemon and thread.name.endswith(_GRPC_THREAD_NAME):
                thread.join(timeout=max(deadline - time.monotonic(), 0.0))

    @property
    def closed(self) -> bool:
        """True once the session is closed or abandoned."""
        return self._closed.is_set()

    def _run(self) -> None:
        """Keep the control stream open until the session is closed or the aggregator sends a stop."""
        failures, last_contact, last_warning = 0, time.monotonic(), 0.0
        while not self._closed.is_set():
            try:
                for message in self._connection.control(self._new_stream()):
                    failures, last_contact = 0, time.monotonic()
                    if self._handle(message):
                        return
            except grpc.RpcError as error:
                code, details = error.code(), one_line(error.details() or "")
                if self._closed.is_set():
                    return
                if (hopeless := too_large("control", error)) is not None:
                    self.incoming.put(hopeless)
                    return
                if code in _FATAL:
                    self.incoming.put(
                        FederationError(f"the aggregator at {self.endpoint} refuses this client: {details}")
                    )
                    return
                now = time.monotonic()
                if now - last_contact > GIVE_UP_AFTER:
                    self.incoming.put(
                        FederationError(
                            f"no contact with the aggregator at {self.endpoint} for {now - last_contact:.0f} s"
                        )
                    )
                    return
                if now - last_warning > _WARN_EVERY:
                    last_warning = now
                    log.warning("aggregator %s: %s; trying again", self.endpoint, details or code.name)
            finally:
                self._takes_updates = False
                self._resolve(None)  # after clearing _takes_updates, so that no new update starts to wait
            # Jitter keeps a thousand clients from reconnecting at the same instant.
            failures += 1
            pause = backoff.delay(failures, _FIRST_BACKOFF, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)  # noqa: S311
            self._closed.wait(pause)
            self._take_renewed()

    def _take_renewed(self) -> None:
        """Reconnect with renewed certificates: a connection keeps those with which it was made."""
        try:
            found = Credentials.read(self._directory)
        except OSError:
            return  # a renewal is in progress, or the files are gone: keep the present ones
        if found != self._connection.credentials:
            log.info("the client's certificate was renewed")
            # Calls in progress on the earlier connection may finish there.
            self._earlier_connections.append(self._connection)
            self._connection = _Connection(self.endpoint, found, self._server_name)

    def _new_stream(self) -> Iterator[pb.ClientMessage]:
        """Return a new stream's messages, from a new queue, since gRPC may still read the broken stream's."""
        previous, self._outgoing = self._outgoing, queue.Queue()
        previous.put(None)
        if self._closed.is_set():
            self._outgoing.put(None)
        return self._requests(self._outgoing)

    def _requests(self, outgoing: "queue.Queue[pb.ClientMessage | None]") -> Iterator[pb.ClientMessage]:
        yield pb.ClientMessage(hello=self._hello)
        while True:
            try:
                message = outgoing.get(timeout=self._heartbeat_seconds)
            except queue.Empty:
                message = pb.ClientMessage(heartbeat=pb.Heartbeat(stage=self.stages.current))
            if message is None:
                return
            yield message

    def _resolve(self, reply: pb.PushReply | None) -> None:
        """Resolve the reply to the update on the stream, if one is awaited."""
        with self._reply_lock:
            awaited, self._awaited = self._awaited, None
        if awaited is not None:
            awaited.set_result(reply)

    def _handle(self, message: pb.ServerMessage) -> bool:
        """Handle one message; return true if it ends the session."""
        match message.WhichOneof("message"):
            case "welcome":
                if (seconds := message.welcome.heartbeat_seconds) > 0:
                    self._heartbeat_seconds = min(max(seconds, _SHORTEST_HEARTBEAT), _LONGEST_HEARTBEAT)
                self._takes_updates = message.welcome.takes_updates
                self.aggregator = message.welcome.instance
                log.info("connected to %s as %s/%d", self.endpoint, self.context.pool, self.context.index)
            case "reply":
                self._resolve(message.reply)
            case "stop" if message.stop.reason == pb.Stop.RESTARTING:
                return False
            case "stop":
                message.stop.message = one_line(message.stop.message)
                self.over.set()
                self.incoming.put(message)
                return True
            case "offer" | "committed":
                self.incoming.put(message)
            case "secure":
                self.secure.receive(message.secure)
        return False
