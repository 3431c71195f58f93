"""gRPC services of the aggregator: authenticate callers, turn streams into updates and models into streams."""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.identities import observer_identity
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.transport import peer_uris

from ...framing import SERVICE, first_update_frame
from ...strategies import Strategy
from ...tensors import TransferError, TruncatedError
from ..clients.membership import Client, ClientId, Refusal
from ..clients.outbox import Outbox, drain
from ..model.auxiliary_stream import auxiliary_messages
from ..model.global_model import GlobalModel
from ..rounds.client_sessions import ClientSessions
from ..rounds.coordinator import Coordinator
from ..rounds.status import StatusReporter
from ..state.notifier import Notifier
from ..state.training_state import TrainingState
from ..telemetry.round_statistics import RoundStatistics
from ..updates import validation
from .call_limit import CallLimit, SupersededError
from .callers import Caller, Callers
from .connections import Connections, peer_address
from .pace import paced, send_paced
from .push import PushHandler, ResendError

log = logging.getLogger(__name__)

Context = aio.ServicerContext[Any, Any]
Request = TypeVar("Request", pb.ClientMessage, pb.PullRequest, pb.GetStatusRequest)
_OBSERVER = pb.DESCRIPTOR.services_by_name["Observer"].full_name

OBSERVERS = 16
"""Number of observers that may connect, such as the operator. They share one certificate."""
PULLS = 2
"""Concurrent pulls of a client: the model, and the strategy's auxiliary tensors."""
HELLO_SECONDS = 30.0
"""Longest time until the hello of a control stream."""


class FederationService:
    """Service for clients. Each presents its own certificate for this job, or that of its HPC pool."""

    def __init__(
        self, callers: Callers, connections: Connections, training: TrainingState, sessions: ClientSessions,
        pushes: PushHandler, strategy: Strategy, statistics: RoundStatistics,
    ) -> None:  # fmt: skip
        self._callers = callers
        self._connections = connections
        self._training = training
        self._sessions = sessions
        self._pushes = pushes
        self._strategy = strategy
        self._statistics = statistics
        self._opening = CallLimit()
        self._pulling = CallLimit()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler for a server. Messages with tensors stay serialized: :mod:`...framing` handles them."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Control": grpc.stream_stream_rpc_method_handler(
                self.Control, _lenient(pb.ClientMessage), pb.ServerMessage.SerializeToString
            ),
            "Pull": grpc.unary_stream_rpc_method_handler(self.Pull, _lenient(pb.PullRequest)),
            "Push": grpc.stream_unary_rpc_method_handler(self.Push, None, pb.PushReply.SerializeToString),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def Control(
        self, request_iterator: AsyncIterator[pb.ClientMessage], context: Context
    ) -> AsyncIterator[pb.ServerMessage]:
        """See federation.proto."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await anext(aiter(request_iterator), None)
        except TimeoutError:
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {HELLO_SECONDS:.0f} s")
        if first is None or not first.HasField("hello"):
            del first  # otherwise gRPC would keep it: see _release
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        try:
            await self._authenticate(context, (first.hello.pool, first.hello.index))
        except BaseException as error:
            del first
            _release(error)
            raise
        try:
            self._sessions.check_hello(first.hello)
            await self._sessions.wait_for_handover(first.hello)
            client = self._sessions.join(first.hello)
        except Refusal as refusal:
            log.warning("%s/%d refused: %s", first.hello.pool, first.hello.index, refusal)
            yield pb.ServerMessage(stop=refusal.stop)
            return
        outbox = client.outbox
        assert outbox is not None
        reader = asyncio.create_task(self._read(request_iterator, client, outbox))
        try:
            async for message in drain(outbox):
                yield message
                if message.HasField("stop"):
                    return
        finally:
            reader.cancel()
            self._sessions.leave(client, outbox)

    async def _read(self, incoming: AsyncIterator[pb.ClientMessage], client: Client, outbox: Outbox) -> None:
        async def answer(update: bytes) -> None:
            outbox.put_nowait(pb.ServerMessage(reply=await self._pushes.answer(update, client)))

        answering: asyncio.Task[None] | None = None
        try:
            async for message in incoming:
                if client.outbox is not outbox:  # messages of a fenced process are ignored
                    continue
                self._sessions.receive(client, message)
                if message.HasField("update"):
                    if answering is not None:  # one unanswered update at a time: do not read on
                        await answering
                    # In a task: the reply may take a while, and other messages must be handled meanwhile.
                    answering = asyncio.create_task(answer(message.update))
        except (aio.AioRpcError, asyncio.CancelledError):
            pass
        except Exception:
            log.exception("%s: its control stream ends, since a message could not be handled", client.name)
        finally:
            if answering is not None:
                answering.cancel()
        outbox.put_nowait(None)

    async def Pull(self, request: pb.PullRequest, context: Context) -> None:
        """See federation.proto."""
        caller = await self._authenticate(context)
        model = self._training.model
        if model is None or request.digest != model.digest:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, "that model is not the current one")
        sending = send_paced(self._messages(request, model, caller.pool), context.write)
        try:
            await self._pulling.run(caller, sending, PULLS * caller.clients)
        except (TruncatedError, SupersededError) as error:
            late = isinstance(error, TruncatedError)
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.ABORTED
            # While a message is in transit gRPC accepts no status: the call then ends with its handler.
            with suppress(aio.InternalError):
                await context.abort(code, str(error))

    async def _messages(self, request: pb.PullRequest, model: GlobalModel, pool: str) -> AsyncIterator[bytes]:
        """Yield the messages of a Pull; count each before it is sent."""
        if request.companion:
            async for message, size in auxiliary_messages(model, self._strategy.companion()):
                self._statistics.sent(pool, NONE, size)
                yield message
            return
        stream, codec = model.stream(request)
        for message, size in stream:
            self._statistics.sent(pool, codec, size)
            yield message

    async def Push(self, request_iterator: AsyncIterator[bytes], context: Context) -> pb.PushReply:
        """See federation.proto."""
        incoming = aiter(request_iterator)
        try:
            return await self._push(incoming, context)
        except BaseException as error:
            _release(error)
            raise
        finally:
            # Unread messages would occupy megabytes until Python's garbage collector runs.
            with suppress(RuntimeError):  # a superseded call is still reading
                await incoming.aclose()  # type: ignore[attr-defined]

    async def _push(self, incoming: AsyncIterator[bytes], context: Context) -> pb.PushReply:
        caller = await self._authenticate(context)
        stream = paced(incoming)
        try:
            # Limited: a call may occupy megabytes even before its header has arrived.
            first = first_update_frame(await self._opening.run(caller, anext(stream, b""), caller.clients))
        except TruncatedError as error:
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except SupersededError as error:
            await _abort(context, grpc.StatusCode.ABORTED, str(error))
        except TransferError:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a header")
        if not caller.speaks_for((first.header.pool, first.header.index)):
            await self._authenticate(context, (first.header.pool, first.header.index))

        async def invite() -> None:
            """Let the client send more than its first message: it waits for the call's initial metadata."""
            await context.send_initial_metadata(())

        try:
            return await self._pushes.take(first, stream, invite)
        except ResendError as error:
            reason = ((validation.REASON_METADATA, error.fault.reason.value),)
            await _abort(context, grpc.StatusCode.DATA_LOSS, error.fault.message, reason)
        except SupersededError as error:
            await _abort(context, grpc.StatusCode.ABORTED, str(error))

    async def _authenticate(self, context: Context, client: ClientId | None = None) -> Caller:
        """Return the caller named by the certificate, which must speak for ``client``, if that is given."""
        uris = peer_uris(context)
        caller = self._callers.find(uris)
        if caller is not None:
            self._connections.admit(caller, caller.clients, peer_address(context.peer()))
        if caller is not None and (client is None or caller.speaks_for(client)):
            return caller
        wanted = "" if client is None else f", not for {one_line(client[0], 60)}/{client[1]}"
        log.warning("%s refused: its certificate is for %s%s", context.peer(), ", ".join(uris) or "no identity", wanted)
        text = f"the certificate does not belong to this client of this job{wanted}"
        await _abort(context, grpc.StatusCode.PERMISSION_DENIED, text)


async def _abort(
    context: Context, code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str], ...] = ()
) -> NoReturn:
    """End a call with an error."""
    await context.abort(code, text, trailing)
    raise AssertionError("abort raises")


def _release(error: BaseException) -> None:
    """Clear the frames in the tracebacks of a handler's error.

    gRPC keeps the error of an aborted call in a reference cycle. Until Python's garbage collector runs, the frames
    would keep the call's messages, of up to 32 MB each, in memory.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


def _lenient(kind: type[Request]) -> Callable[[bytes], Request]:
    """Return a parser that turns unreadable bytes into an empty message, which requests nothing.

    The handler would not receive a parser's error: gRPC logs a traceback for each, and reads no further.
    """

    def parse(data: bytes) -> Request:
        try:
            return kind.FromString(data)
        except DecodeError:
            return kind()

    return parse


class ObserverService:
    """Service for observers of the job: the operator, or the local runner."""

    def __init__(
        self, job_uid: str, connections: Connections, coordinator: Coordinator, reporter: StatusReporter,
        changes: Notifier,
    ) -> None:  # fmt: skip
        self._job_uid = job_uid
        self._connections = connections
        self._coordinator = coordinator
        self._reporter = reporter
        self._changes = changes
        self.completion_seen = asyncio.Event()
        """Set once an observer has read a status with the phase COMPLETE."""

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler for a server."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetStatus": grpc.unary_unary_rpc_method_handler(
                self.GetStatus, _lenient(pb.GetStatusRequest), pb.FederationStatus.SerializeToString
            ),
            "WatchStatus": grpc.unary_stream_rpc_method_handler(
                self.WatchStatus, _lenient(pb.GetStatusRequest), pb.FederationStatus.SerializeToString
            ),
            "WaitFor": grpc.unary_unary_rpc_method_handler(
                self.WaitFor, _lenient(pb.WaitForRequest), pb.WaitForReply.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(_OBSERVER, methods)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.FederationStatus:
        """See federation.proto."""
        await self._authenticate(context)
        status = self._reporter.status()
        self._seen(status)
        return status

    async def WatchStatus(self, request: pb.GetStatusRequest, context: Context) -> AsyncIterator[pb.FederationStatus]:
        """See federation.proto."""
        await self._authenticate(context)
        async for _ in self._changes.listen():
            status = self._reporter.status()
            yield status
            self._seen(status)

    async def WaitFor(self, request: pb.WaitForRequest, context: Context) -> pb.WaitForReply:
        """See federation.proto."""
        await self._authenticate(context)
        self._coordinator.wait_for(request.clients)
        return pb.WaitForReply()

    def _seen(self, status: pb.FederationStatus) -> None:
        if status.phase == pb.FederationStatus.COMPLETE:
            self.completion_seen.set()

    async def _authenticate(self, context: Context) -> None:
        if observer_identity(self._job_uid) not in peer_uris(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the certificate is not this job's observer's")
        self._connections.admit("observer", OBSERVERS, peer_address(context.peer()))
