"""The gRPC face of a federation: who may call, and how streams become updates and models become streams."""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.identities import observer_identity
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.transport import peer_uris

from ...framing import SERVICE, Frame, update_frame
from ...tensors import TransferError, TruncatedError
from ..clients.membership import Client, ClientId, Refusal
from ..clients.outbox import Outbox
from ..model import messages
from ..model.auxiliary_stream import auxiliary_messages
from ..model.global_model import GlobalModel
from ..rounds.coordinator import Coordinator
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
"""The operator, and whoever else watches the job: all with one certificate."""
PULLS = 2
"""Of a client at a time: the model, and what the strategy sends along."""
HELLO_SECONDS = 30.0
"""How long a control stream may say nothing at its beginning."""


class FederationService:
    """Serves clients. Each presents a certificate of its own for this job, or its HPC pool's."""

    def __init__(self, coordinator: Coordinator, connections: Connections) -> None:
        self._coordinator = coordinator
        self._connections = connections
        self._pushes = PushHandler(coordinator)
        self._callers = Callers(coordinator.spec, coordinator.job.uid)
        self._opening = CallLimit()
        self._pulling = CallLimit()

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server. The tensors' messages stay as they are: :mod:`..framing` reads and makes them."""
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
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {HELLO_SECONDS:.0f} s")
            return
        if first is None or not first.HasField("hello"):
            del first  # or gRPC would keep it: see _release
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
            return
        try:
            await self._authenticate(context, (first.hello.pool, first.hello.index))
        except BaseException as error:
            del first
            _release(error)
            raise
        try:
            self._coordinator.intake.permissions.check_hello(first.hello)
            await self._coordinator.handover.wait(first.hello)
            client = self._coordinator.join(first.hello)
        except Refusal as refusal:
            log.warning("%s/%d refused: %s", first.hello.pool, first.hello.index, refusal)
            yield pb.ServerMessage(stop=refusal.stop)
            return
        outbox = client.outbox
        assert outbox is not None
        reader = asyncio.create_task(self._read(request_iterator, client, outbox))
        try:
            async for message in messages.spoken(outbox):
                yield message
                if message.HasField("stop"):
                    return
        finally:
            reader.cancel()
            self._coordinator.leave(client, outbox)

    async def _read(
        self,
        incoming: AsyncIterator[pb.ClientMessage],
        client: Client,
        outbox: Outbox,
    ) -> None:
        async def answer(update: bytes) -> None:
            outbox.put_nowait(pb.ServerMessage(reply=await self._pushes.answer(update, client)))

        answering: asyncio.Task[None] | None = None
        try:
            async for message in incoming:
                if client.outbox is not outbox:  # a fenced process is not listened to any more
                    continue
                self._coordinator.hear(client, message)
                if message.HasField("update"):
                    if answering is not None:  # who does not wait for the answer is not read on
                        await answering
                    # Aside: an answer may take a while, and what else the client says is to be heard.
                    answering = asyncio.create_task(answer(message.update))
        except (aio.AioRpcError, asyncio.CancelledError):
            pass
        finally:
            if answering is not None:
                answering.cancel()
        outbox.put_nowait(None)

    async def Pull(self, request: pb.PullRequest, context: Context) -> None:
        """See federation.proto."""
        caller = await self._authenticate(context)
        model = self._coordinator.training.model
        if model is None or request.digest != model.digest:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "that model is not the current one")
            return
        sending = send_paced(self._messages(request, model, caller.pool), context.write)
        try:
            await self._pulling.run(caller, sending, PULLS * caller.clients)
        except (TruncatedError, SupersededError) as error:
            late = isinstance(error, TruncatedError)
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.ABORTED
            # With a message on its way gRPC takes no status any more: the call ends with its handler.
            with suppress(aio.InternalError):
                await context.abort(code, str(error))

    async def _messages(self, request: pb.PullRequest, model: GlobalModel, pool: str) -> AsyncIterator[bytes]:
        """Yield the answer to a Pull; each message is counted before it goes."""
        if request.companion:
            async for message, size in auxiliary_messages(model, self._coordinator.companion):
                self._coordinator.statistics.sent(pool, NONE, size)
                yield message
            return
        stream, codec = model.stream(request)
        for message, size in stream:
            self._coordinator.statistics.sent(pool, codec, size)
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
            # What is left of it would keep megabytes until Python's collector comes by.
            with suppress(RuntimeError):  # a call that was superseded is still reading
                await incoming.aclose()  # type: ignore[attr-defined]

    async def _push(self, incoming: AsyncIterator[bytes], context: Context) -> pb.PushReply:
        caller = await self._authenticate(context)
        stream = paced(incoming)
        first = None
        try:
            # Until its header is here a call may take megabytes, too.
            first = _first_frame(await self._opening.run(caller, anext(stream, b""), caller.clients))
        except TruncatedError as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except SupersededError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
        if first is None or first.header is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a header")
        assert first is not None and first.header is not None
        if not caller.speaks_for((first.header.pool, first.header.index)):
            await self._authenticate(context, (first.header.pool, first.header.index))

        async def invite() -> None:
            """A client sends no more than its first message before it hears of the call."""
            await context.send_initial_metadata(())

        try:
            return await self._pushes.take(first, stream, invite)
        except ResendError as error:
            reason = ((validation.REASON_METADATA, error.fault.reason.value),)
            await context.abort(grpc.StatusCode.DATA_LOSS, error.fault.message, reason)
        except SupersededError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
        raise AssertionError("abort raises")

    async def _authenticate(self, context: Context, client: ClientId | None = None) -> Caller:
        """Return who calls, by the certificate; it must speak for ``client``, if that is given."""
        uris = peer_uris(context)
        caller = self._callers.find(uris)
        if caller is not None:
            self._connections.admit(caller, caller.clients, peer_address(context.peer()))
        if caller is not None and (client is None or caller.speaks_for(client)):
            return caller
        wanted = "" if client is None else f", not for {one_line(client[0], 60)}/{client[1]}"
        log.warning("%s refused: its certificate is for %s%s", context.peer(), ", ".join(uris) or "nobody", wanted)
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"the certificate is not one of this client's of this job{wanted}"
        )
        raise AssertionError("abort raises")


def _release(error: BaseException) -> None:
    """Clear the frames that an error of a handler has passed through.

    gRPC keeps the error of a call that is aborted, in a cycle: until Python's collector comes by, the frames would keep
    the call's messages, of up to 32 MB each.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


def _lenient(kind: type[Request]) -> Callable[[bytes], Request]:
    """Return a parser that takes what cannot be read for an empty message, which asks for nothing.

    An error here would be none of the handler's: gRPC logs a trace for each, and a stream would not be read any more.
    """

    def parse(data: bytes) -> Request:
        try:
            return kind.FromString(data)
        except DecodeError:
            return kind()

    return parse


def _first_frame(message: bytes) -> Frame[pb.UpdateHeader] | None:
    try:
        return update_frame(message)
    except TransferError:
        return None


class ObserverService:
    """Serves whoever watches the job: the operator, or the local runner."""

    def __init__(self, coordinator: Coordinator, connections: Connections) -> None:
        self._coordinator = coordinator
        self._connections = connections
        self.completion_seen = asyncio.Event()
        """An observer has read a status that says COMPLETE."""

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server."""
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
        status = self._coordinator.status()
        self._seen(status)
        return status

    async def WatchStatus(self, request: pb.GetStatusRequest, context: Context) -> AsyncIterator[pb.FederationStatus]:
        """See federation.proto."""
        await self._authenticate(context)
        async for _ in self._coordinator.training.changes.listen():
            status = self._coordinator.status()
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
        if observer_identity(self._coordinator.job.uid) not in peer_uris(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the certificate is not this job's observer's")
        self._connections.admit("observer", OBSERVERS, peer_address(context.peer()))
