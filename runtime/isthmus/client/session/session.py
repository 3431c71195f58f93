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
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import channel

from ...framing import PULL, PUSH
from ...tensors import CHUNK_BYTES, TransferError
from ..context import Context
from ..errors import IN_A_FORK, FederationError
from .stage_times import Stages

log = logging.getLogger("isthmus")

# An aggregator that is away this long will not come back. Seconds.
GIVE_UP_AFTER = 1800.0
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 5.0
_WARN_EVERY = 15.0
# Whatever the aggregator asks for. Seconds.
_SHORTEST_HEARTBEAT, _LONGEST_HEARTBEAT = 1.0, 300.0
# Closing waits at most this long for what is on its way. Seconds.
_FAREWELL_SECONDS = 5.0
# cygrpc's ForkManagedThread runs a function of this name, and Python names threads after it.
_GRPC_THREAD_NAME = "(_run)"
# What no waiting mends: the aggregator is there and does not want this client.
_FATAL = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)


def too_large(what: str, error: grpc.RpcError) -> FederationError | None:
    """Return what to raise where a call fails since a message is above a limit on its size: it would fail again.

    Tensors are cut into small messages; what is said of them all is one, the first.
    """
    details = one_line(error.details() or "")
    if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or "larger than max" not in details:
        return None
    return FederationError(
        f"{what}: so many tensors with such long names do not fit a message's header ({details}):"
        " let fewer travel with isthmus.rounds(..., parameters=...), or shorten their names"
    )


class _Line:
    """A channel, and the calls that go through it."""

    def __init__(self, endpoint: str, credentials: Credentials, server_name: str | None) -> None:
        self.credentials = credentials
        self.channel = channel(endpoint, credentials, server_name)
        self.control = FederationStub(self.channel).Control
        # The messages of the calls that hold tensors are framing's.
        self.pull: Callable[[pb.PullRequest], Iterator[bytes]] = self.channel.unary_stream(
            PULL, request_serializer=pb.PullRequest.SerializeToString
        )
        self.push: grpc.StreamUnaryMultiCallable[bytes, pb.PushReply] = self.channel.stream_unary(
            PUSH, response_deserializer=pb.PushReply.FromString
        )
        # On the wire a stream of one message is a single message, and gRPC needs no thread to send it.
        push_one: grpc.UnaryUnaryMultiCallable[bytes, pb.PushReply] = self.channel.unary_unary(
            PUSH, response_deserializer=pb.PushReply.FromString
        )
        self.push_one: Callable[[bytes], pb.PushReply] = push_one


class Incoming(queue.Queue["pb.ServerMessage | FederationError"]):
    """What the aggregator has said and the script has not heard yet. Of offers, and of commits, only the newest counts:
    those of the rounds that a slow client misses must not pile up, each with a model."""

    def _put(self, item: "pb.ServerMessage | FederationError") -> None:
        kind = item.WhichOneof("message") if isinstance(item, pb.ServerMessage) else None
        if kind in ("offer", "committed"):
            for place, older in enumerate(self.queue):
                if isinstance(older, pb.ServerMessage) and older.WhichOneof("message") == kind:
                    del self.queue[place]
                    break
        super()._put(item)


class Session:
    """Keeps the control stream up, in threads of its own, and hands what the aggregator says to the script's thread."""

    def __init__(self, context: Context, evaluates: bool, stopping: threading.Event) -> None:
        environ = os.environ
        self.job_uid = environ.get(identities.ENV_JOB_UID, "")
        self.endpoint = environ[identities.ENV_ENDPOINT]
        self.context = context
        self.instance = uuid.uuid4().hex
        self.incoming = Incoming()
        """Offers, commits and stops, in the order of their arrival."""
        self.aggregator = ""
        """The aggregator's process that has welcomed us."""
        self.stages = Stages()
        self.over = threading.Event()
        """The aggregator has ended our part: it need not be there any more."""
        self.stopping = stopping
        """The process was told to stop."""
        self._directory = Path(environ.get(identities.ENV_TLS_DIR, ""))
        self._server_name = environ.get(identities.ENV_SERVER_NAME)
        try:
            credentials = Credentials.read(self._directory)
        except OSError as error:
            raise FederationError(
                f"cannot read the client's certificate: {error.filename}: {error.strerror}"
                f" ({identities.ENV_TLS_DIR} must name a directory with ca.crt, tls.crt and tls.key)"
            ) from None
        self._earlier_threads = set(threading.enumerate())
        self._line = _Line(self.endpoint, credentials, self._server_name)
        self._earlier_lines: list[_Line] = []
        self._hello = pb.Hello(
            job_uid=self.job_uid,
            pool=context.pool,
            index=context.index,
            attempt=context.attempt,
            instance=self.instance,
            version=version("isthmus"),
            evaluates=evaluates,
        )
        self._outgoing: queue.Queue[pb.ClientMessage | None] = queue.Queue()  # of the present stream
        self._asking = threading.Lock()
        self._takes_updates = False  # the present stream
        self._asked: Future[pb.PushReply | None] | None = None  # by an update that is on it; None: there is no answer
        self._heartbeat_seconds = 10.0
        self._closed = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="isthmus-control", daemon=True)
        self._thread.start()

    def pull(self, request: pb.PullRequest) -> Iterator[bytes]:
        """The messages of a model."""
        return self._line.pull(request)

    def push_one(self, message: bytes) -> pb.PushReply:
        """Sends an update that is a single message: on the control stream, where the aggregator takes it there.

        Raises :class:`TransferError` where it should be sent again.
        """
        with self._asking:
            aside = self._takes_updates and len(message) <= CHUNK_BYTES
            asked = self._asked = Future() if aside else None
            if asked is not None:
                self._outgoing.put(pb.ClientMessage(update=message))
        reply = asked.result() if asked is not None else None
        if reply is None:  # the stream has broken, and maybe the connection: a call tells
            reply = self._line.push_one(message)
        if reply.verdict == pb.PushReply.RESEND:
            raise TransferError(reply.message)
        return reply

    def works_on(self, round_number: int, base_digest: str) -> None:
        """Notes what is in hand, for the next hello: an aggregator that restarts shall not pass it over."""
        hello = pb.Hello()
        hello.CopyFrom(self._hello)
        hello.round, hello.base_digest = round_number, base_digest
        self._hello = hello

    def push(self, messages: Iterator[bytes]) -> pb.PushReply:
        """Sends an update's messages: the first one, and the others when the aggregator has room for them.

        What it does not read yet would lie in its memory, megabytes for each client, as flow control lets it through.
        """
        call: Future[Any] = Future()

        def in_turn() -> Iterator[bytes]:
            yield next(messages)
            call.result().initial_metadata()
            yield from messages

        pushing: Any = self._line.push.future(in_turn())
        call.set_result(pushing)
        try:
            reply: pb.PushReply = pushing.result()
        except grpc.FutureCancelledError:
            raise pushing from None  # the call itself is the error that tells why
        return reply

    def send(self, message: pb.ClientMessage) -> None:
        """Queues a message for the control stream. One that a breaking stream swallows is lost: what matters is asked
        for again after the next hello."""
        self._outgoing.put(message)

    def close(self) -> None:
        """Lets what is queued go out, and ends the stream."""
        if not self._closed.is_set():
            self._closed.set()
            self._outgoing.put(None)
            self._thread.join(timeout=_FAREWELL_SECONDS)
            for line in (*self._earlier_lines, self._line):
                line.channel.close()
            self._join_grpc_threads()

    def abandon(self) -> None:
        """Give the session up in a fork of its process, where it has no threads, and its locks may be held for ever."""
        self._closed = threading.Event()
        self._closed.set()
        self._abandoned = True

    def require_own_process(self) -> None:
        """Raise :class:`FederationError` in a fork of the session's process."""
        if self._abandoned:
            raise FederationError(IN_A_FORK)

    def _join_grpc_threads(self) -> None:
        """Waits for gRPC's own threads: one that wakes while the interpreter shuts down aborts the process."""
        until = time.monotonic() + _FAREWELL_SECONDS
        for thread in threading.enumerate():
            if thread not in self._earlier_threads and thread.daemon and thread.name.endswith(_GRPC_THREAD_NAME):
                thread.join(timeout=max(until - time.monotonic(), 0.0))

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def _run(self) -> None:
        """Connects, listens, and connects again, until the session is closed or the aggregator says stop."""
        backoff, last_contact, last_warning = _FIRST_BACKOFF, time.monotonic(), 0.0
        while not self._closed.is_set():
            try:
                for message in self._line.control(self._new_stream()):
                    backoff, last_contact = _FIRST_BACKOFF, time.monotonic()
                    if self._take(message):
                        return
            except grpc.RpcError as error:
                code, details = error.code(), one_line(error.details() or "")
                if self._closed.is_set():
                    return
                if (hopeless := too_large("control", error)) is not None:
                    self.incoming.put(hopeless)
                    return
                if code in _FATAL:
                    self.incoming.put(FederationError(f"the aggregator at {self.endpoint} refuses us: {details}"))
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
                self._answer(None)  # after that: no later update asks
            # A little randomness keeps a thousand clients from coming back at the same instant.
            self._closed.wait(backoff * random.uniform(0.5, 1.0))  # noqa: S311
            backoff = min(backoff * 2, _LONGEST_BACKOFF)
            self._take_renewed()

    def _take_renewed(self) -> None:
        """Takes up certificates that were renewed since: a connection keeps those that it was made with."""
        try:
            found = Credentials.read(self._directory)
        except OSError:
            return  # between two files, or gone: what we have still serves
        if found != self._line.credentials:
            log.info("the client's certificate was renewed")
            # Calls that are under way through the earlier one may end there.
            self._earlier_lines.append(self._line)
            self._line = _Line(self.endpoint, found, self._server_name)

    def _new_stream(self) -> Iterator[pb.ClientMessage]:
        """A new stream's messages. It gets a queue of its own, since gRPC may still read the broken one's."""
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

    def _answer(self, reply: pb.PushReply | None) -> None:
        """Ends the wait of an update on the stream, if there is one."""
        with self._asking:
            asked, self._asked = self._asked, None
        if asked is not None:
            asked.set_result(reply)

    def _take(self, message: pb.ServerMessage) -> bool:
        """Return whether this message was the last."""
        match message.WhichOneof("message"):
            case "welcome":
                if (seconds := message.welcome.heartbeat_seconds) > 0:
                    self._heartbeat_seconds = min(max(seconds, _SHORTEST_HEARTBEAT), _LONGEST_HEARTBEAT)
                self._takes_updates = message.welcome.takes_updates
                self.aggregator = message.welcome.instance
                log.info("connected to %s as %s/%d", self.endpoint, self.context.pool, self.context.index)
            case "reply":
                self._answer(message.reply)
            case "stop" if message.stop.reason == pb.Stop.RESTARTING:
                return False
            case "stop":
                message.stop.message = one_line(message.stop.message)
                self.over.set()
                self.incoming.put(message)
                return True
            case "offer" | "committed":
                self.incoming.put(message)
        return False
