"""Reception of pushed updates, on either of the two calls that carry them. Each update gets one reply."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import CodecError
from ...framing import FirstFrame, first_update_frame, receive_update
from ...tensors import State, TransferError
from ..clients.membership import Client
from ..model.compression import Compression
from ..state.training_state import TrainingState
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.round_statistics import RoundStatistics
from ..updates import validation
from ..updates.intake import Intake
from ..updates.receive_slots import AHEAD_BYTES
from ..updates.validation import Fault
from .call_limit import CallLimit, SupersededError
from .readahead import read_ahead

log = logging.getLogger(__name__)

_RESULTS = {
    pb.PushReply.ACCEPTED: "accepted",
    pb.PushReply.STALE: "stale",
    pb.PushReply.INVALID: "invalid",
    pb.PushReply.FENCED: "fenced",
    pb.PushReply.CLOSED: "closed",
}


class ResendError(Exception):
    """An update was damaged in transit or cannot be kept now. The client has to send it again."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class _OutdatedError(Exception):
    """The base model of an update went out of use while the update was received."""


class PushHandler:
    """Receiver of updates, which counts the result of each."""

    def __init__(
        self, instance: str, training: TrainingState, intake: Intake, compression: Compression,
        statistics: RoundStatistics, metrics: AggregatorMetrics,
    ) -> None:  # fmt: skip
        """``instance``: identity of this process, which is part of each reply."""
        self._instance = instance
        self._training = training
        self._intake = intake
        self._compression = compression
        self._statistics = statistics
        self._metrics = metrics
        self._calls = CallLimit()

    async def take(
        self, first: FirstFrame, stream: AsyncIterator[bytes], invite: Callable[[], Awaitable[None]]
    ) -> pb.PushReply:
        """Receive an update, given its first message, and return the reply.

        ``invite`` is called if more messages follow, as soon as there is room for them.

        Raises:
            ResendError: the client has to send the update again.
            SupersededError: the client has begun another push meanwhile.
        """
        header = first.header
        # Checked first: a caller without permission must not end the call of the real client.
        if (reply := self._intake.permissions.check_update(header)) is not None:
            return self._counted(header, reply)
        return await self._calls.run((header.pool, header.index), self._take(first, stream, invite))

    async def _take(
        self, first: FirstFrame, stream: AsyncIterator[bytes], invite: Callable[[], Awaitable[None]]
    ) -> pb.PushReply:
        started, header = time.monotonic(), first.header
        await self._intake.wait_until_decidable(header)
        reply = self._intake.early_reply(header)
        repeated = reply is not None and reply.verdict == pb.PushReply.ACCEPTED
        if reply is None:
            try:
                reply = await self._receive_in_turn(first, stream, started, invite)
            except CodecError as error:  # sending it again would not help
                reply = await self._intake.refuse(header, validation.fault_of(error))
            except TransferError as error:
                fault = validation.fault_of(error)
                self._count(header, "corrupt", fault.reason)
                log.warning("%s/%d: update of round %d refused: %s", header.pool, header.index, header.round, fault)
                raise ResendError(fault) from None
        return self._counted(header, reply, repeated=repeated)

    def _counted(self, header: pb.UpdateHeader, reply: pb.PushReply, *, repeated: bool = False) -> pb.PushReply:
        """Count a reply, and add the identity of this process to it. Raise :class:`ResendError`."""
        if reply.verdict == pb.PushReply.RESEND:
            self._count(header, "unconnected", reply.reason)
            raise ResendError(Fault(validation.Reason(reply.reason), reply.message))
        self._count(header, "repeated" if repeated else _RESULTS[reply.verdict], reply.reason)
        reply.instance = self._instance
        return reply

    async def answer(self, message: bytes, client: Client) -> pb.PushReply:
        """Return the reply to an update in one message, from a client's control stream. Never raises."""
        try:
            first = first_update_frame(message)
            if first.checksum is None:
                raise TransferError("an update on the control stream must be whole")
            if (first.header.pool, first.header.index) != client.id:
                raise TransferError(f"this is the control stream of {client.name}")
            return await self.take(first, _no_messages(), _no_invitation)
        except ResendError as error:
            fault = error.fault
        except SupersededError as error:
            fault = Fault(validation.Reason.TRUNCATED, str(error))
        except TransferError as error:
            fault = validation.fault_of(error)
            log.warning("%s: update refused: %s", client.name, fault)
        except Exception as error:
            log.exception("%s: its update cannot be answered", client.name)
            fault = Fault(validation.Reason.MALFORMED, f"{type(error).__name__}; see the aggregator's log")
        return pb.PushReply(verdict=pb.PushReply.RESEND, message=fault.message, reason=fault.reason)

    def _count(self, header: pb.UpdateHeader, result: str, reason: str = "") -> None:
        self._metrics.updates.labels(**self._metrics.bound, pool=header.pool, result=result).inc()
        if reason:
            self._metrics.refused.labels(**self._metrics.bound, pool=header.pool, reason=reason).inc()

    async def _receive_in_turn(
        self, first: FirstFrame, stream: AsyncIterator[bytes], started: float, invite: Callable[[], Awaitable[None]]
    ) -> pb.PushReply:
        """Receive an update once there is room for it. Raise ``TransferError``."""
        model, receive_slots = self._training.model, self._intake.receive_slots
        async with receive_slots.ticket(model) as file, AsyncExitStack() as stack:
            if first.checksum is None:
                await invite()
            if file is not None:
                return await self._receive(first, stream, file, started)
            slot = stack.enter_async_context(receive_slots.slot(model))
            if first.checksum is None:
                room, stream = await read_ahead(stream, slot, AHEAD_BYTES)
            else:
                room = await slot
            return await self._receive(first, stream, room, started)

    async def _receive(
        self, first: FirstFrame, stream: AsyncIterator[bytes], room: State, started: float
    ) -> pb.PushReply:
        """Receive a whole update into the tensors of ``room``; any fault of the stream refuses all of it.

        Raises ``TransferError``.
        """
        header, intake = first.header, self._intake
        reception = self._compression.reception(header, intake.base(header), room)

        def check() -> None:
            # A slow client must not keep the base model of a Delta in memory for ever.
            if not intake.is_current(header):
                raise _OutdatedError

        try:
            tensors, size = await receive_update(first, stream, reception, check)
        except _OutdatedError:
            return intake.early_reply(header) or validation.reply(pb.PushReply.STALE, "its round is over")
        codec = "+".join(header.codecs) or NONE
        self._statistics.received(header.pool, codec, size, time.monotonic() - started)
        return await intake.accept(header, tensors)


async def _no_messages() -> AsyncIterator[bytes]:
    return
    yield b""


async def _no_invitation() -> None:
    pass
