"""How pushed updates are taken in, over whichever of the two ways they come: each is answered once."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import CodecError
from ...framing import Frame, receive_update, update_frame
from ...tensors import State, TransferError
from ..clients.membership import Client
from ..rounds.coordinator import Coordinator
from ..updates import validation
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
    """An update was damaged on its way, or cannot be kept now: the client is to send it again."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class _OutdatedError(Exception):
    """The global model has changed while an update was on its way."""


class PushHandler:
    """Takes in updates, and counts what becomes of each."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._intake = coordinator.intake
        self._metrics = coordinator.metrics
        self._calls = CallLimit()

    async def take(
        self,
        first: Frame[pb.UpdateHeader],
        stream: AsyncIterator[bytes],
        invite: Callable[[], Awaitable[None]],
    ) -> pb.PushReply:
        """An update, whose first message has a header, and the answer to it. Raises :class:`ResendError`, and
        :class:`SupersededError` where the client sends another one meanwhile.

        ``invite`` is called where there is more to come, once there is room for it.
        """
        header = first.header
        assert header is not None
        # Who may not hand in anything must not end the call of who may.
        if (answer := self._intake.permissions.check_update(header)) is not None:
            return self._answered(header, answer)
        return await self._calls.run((header.pool, header.index), self._take(first, header, stream, invite))

    async def _take(
        self,
        first: Frame[pb.UpdateHeader],
        header: pb.UpdateHeader,
        stream: AsyncIterator[bytes],
        invite: Callable[[], Awaitable[None]],
    ) -> pb.PushReply:
        started = time.monotonic()
        await self._intake.wait_until_decidable(header)
        reply = self._intake.early_reply(header)
        repeated = reply is not None and reply.verdict == pb.PushReply.ACCEPTED
        if reply is None:
            try:
                reply = await self._receive_in_turn(first, header, stream, started, invite)
            except CodecError as error:  # sent again it would be the same
                reply = self._intake.early_reply(header) or self._intake.reject(header, validation.fault_of(error))
            except TransferError as error:
                fault = validation.fault_of(error)
                self._count(header, "corrupt", fault.reason)
                log.warning("%s/%d: update of round %d refused: %s", header.pool, header.index, header.round, fault)
                raise ResendError(fault) from None
        return self._answered(header, reply, repeated=repeated)

    def _answered(self, header: pb.UpdateHeader, reply: pb.PushReply, *, repeated: bool = False) -> pb.PushReply:
        """Counts an answer, and signs it. Raises :class:`ResendError`."""
        if reply.verdict == pb.PushReply.RESEND:
            self._count(header, "unconnected", reply.reason)
            raise ResendError(Fault(validation.Reason(reply.reason), reply.message))
        self._count(header, "repeated" if repeated else _RESULTS[reply.verdict], reply.reason)
        reply.instance = self._coordinator.instance
        return reply

    async def answer(self, message: bytes, client: Client) -> pb.PushReply:
        """The answer to an update that came whole, on a client's control stream. Never raises."""
        try:
            frame = update_frame(message)
            if frame.header is None or frame.checksum is None:
                raise TransferError("an update on the control stream must be whole")
            if (frame.header.pool, frame.header.index) != client.id:
                raise TransferError(f"this is the control stream of {client.name}")
            return await self.take(frame, _nothing(), _nobody)
        except ResendError as error:
            fault = error.fault
        except SupersededError as error:
            fault = Fault(validation.Reason.TRUNCATED, str(error))
        except TransferError as error:
            fault = validation.fault_of(error)
            log.warning("%s: update refused: %s", client.name, fault)
        except Exception as error:
            log.exception("%s: its update cannot be answered", client.name)
            fault = Fault(validation.Reason.MALFORMED, f"{type(error).__name__}; the aggregator's log has more")
        return pb.PushReply(verdict=pb.PushReply.RESEND, message=fault.message, reason=fault.reason)

    def _count(self, header: pb.UpdateHeader, result: str, reason: str = "") -> None:
        self._metrics.updates.labels(**self._metrics.bound, pool=header.pool, result=result).inc()
        if reason:
            self._metrics.refused.labels(**self._metrics.bound, pool=header.pool, reason=reason).inc()

    async def _receive_in_turn(
        self,
        first: Frame[pb.UpdateHeader],
        header: pb.UpdateHeader,
        stream: AsyncIterator[bytes],
        started: float,
        invite: Callable[[], Awaitable[None]],
    ) -> pb.PushReply:
        """Takes in an update when there is room for it. Raises ``TransferError``."""
        model, receive_slots = self._coordinator.training.model, self._intake.receive_slots
        async with receive_slots.ticket(model) as file, AsyncExitStack() as stack:
            if first.checksum is None:
                await invite()
            if file is not None:
                return await self._receive(first, header, stream, file, started)
            place = stack.enter_async_context(receive_slots.slot(model))
            if first.checksum is None:
                room, stream = await read_ahead(stream, place, AHEAD_BYTES)
            else:
                room = await place
            return await self._receive(first, header, stream, room, started)

    async def _receive(
        self,
        first: Frame[pb.UpdateHeader],
        header: pb.UpdateHeader,
        stream: AsyncIterator[bytes],
        room: State,
        started: float,
    ) -> pb.PushReply:
        """Takes in a whole update; whatever is wrong with the stream refuses all of it. Raises ``TransferError``."""
        reception = self._coordinator.compression.reception(header, self._intake.base(header), room)
        model = self._coordinator.training.model

        def still_wanted() -> None:
            """A slow client must not hold the base model of a Delta for ever."""
            nonlocal model
            if self._coordinator.training.model is not model:
                model = self._coordinator.training.model
                if self._intake.early_reply(header) is not None:
                    raise _OutdatedError

        try:
            tensors, size = await receive_update(first, stream, reception, still_wanted)
        except _OutdatedError:
            reply = self._intake.early_reply(header)
            return reply or validation.reply(pb.PushReply.STALE, "its round is over")
        codec = "+".join(header.codecs) or NONE
        self._coordinator.statistics.received(header.pool, codec, size, time.monotonic() - started)
        return await self._intake.accept(header, tensors)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _nobody() -> None:
    pass
