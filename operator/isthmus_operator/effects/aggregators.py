"""Calls to aggregators for their status."""

import logging
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio

from isthmus_contracts import identities as ids
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import ObserverStub
from isthmus_contracts.wire.addresses import joined
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import aio_channel

from ..fair_semaphore import slot_released
from ..metrics import OBSERVER_ERRORS, SILENT_AGGREGATORS
from ..state.aggregator_status import view
from ..state.observed import FederationView
from ..text import one_line
from .circuit_breaker import CircuitBreaker

log = logging.getLogger(__name__)

CALL_SECONDS = 4.0


@dataclass
class _Connection:
    address: str
    credentials: Credentials
    channel: aio.Channel
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)


_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Aggregators:
    """Open channels to running aggregators, one for each."""

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}

    async def ask(self, job_uid: str, ip: str, credentials: Credentials) -> FederationView | str:
        """Return the aggregator's status or an error message. The call goes to its pod's address, without DNS."""
        address = joined(ip, ids.AGGREGATOR_PORT)
        connection = self._connections.get(job_uid)
        if connection is None or connection.address != address or connection.credentials != credentials:
            await self.forget(job_uid)
            channel = aio_channel(address, credentials, ids.aggregator_server_name(job_uid))
            connection = self._connections[job_uid] = _Connection(address, credentials, channel)
        stub: Any = ObserverStub(connection.channel)
        if not connection.breaker.admits():
            return f"no answer from {address}"
        try:
            async with slot_released():
                answer = await stub.GetStatus(pb.GetStatusRequest(job_uid=job_uid), timeout=CALL_SECONDS)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                # A refusal is fast; only silence costs time.
                connection.breaker.succeeded()
            elif connection.breaker.failed(error.code().name):
                log.warning("the aggregator at %s does not respond; polling it less often", address)
            self._count()
            OBSERVER_ERRORS.labels(error.code().name).inc()
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # With a new channel, the next call connects at once instead of waiting for this one's back-off.
                await self.forget(job_uid)
            if error.code() in _SILENT:
                # gRPC words this differently each time; a status with its words would be written each time.
                log.debug("%s: %s: %s", address, error.code().name, error.details())
                return f"no answer from {address}"
            return f"{error.code().name}: {one_line(error.details() or '', 200)}"
        finally:
            connection.breaker.abandoned()
        if connection.breaker.succeeded():
            self._count()
        return view(answer)

    def _count(self) -> None:
        SILENT_AGGREGATORS.set(sum(connection.breaker.is_open for connection in self._connections.values()))

    def count(self) -> int:
        """Return the number of open channels."""
        return len(self._connections)

    async def forget(self, job_uid: str) -> None:
        """Close the channel of a job's aggregator."""
        connection = self._connections.pop(job_uid, None)
        if connection is not None:
            self._count()
            await connection.channel.close()

    async def close(self) -> None:
        """Close every channel."""
        for job_uid in list(self._connections):
            await self.forget(job_uid)
