"""Calls to the sites' bridges, over gRPC with mutual TLS."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc import aio

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.slurm_states import DISPLACED, Meaning, meaning
from isthmus_contracts.wire.pki import Credentials

from ..fair_semaphore import slot_released
from ..metrics import BRIDGE_CALLS, BRIDGE_SECONDS, CIRCUIT_OPEN
from ..state.clock import Clock
from ..state.job_record import LAST_SECOND
from ..state.observed import PoolPhase, PoolView, ProblemKind
from ..text import last_lines, one_line
from .bridge_channels import CALL_SECONDS, BridgeChannels, BridgeError
from .circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from isthmus_contracts.pb.bridge_pb2_grpc import BridgeAsyncStub

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_DENIED = (grpc.StatusCode.PERMISSION_DENIED,)
_NO_ANSWER = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT,)
# Prefix of a bridge's message if its policy denies a request; see Denial in isthmus_bridge/policy/authorization.py.
_POLICY = "policy "
# A failure after at least this time counts as silence; a quick one costs nothing. Seconds.
_SLOW_SECONDS = 1.0
# Concurrent calls to one site; others wait at most as long as for a response.
_CALLS_PER_SITE = 16
# If no call was tried for this time after the pause of an open breaker, a successful DescribeSite closes it. Seconds.
_FORGIVEN_AFTER = 60.0


@dataclass(eq=False)
class _SiteState:
    """The breaker and the call limit of one site."""

    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CALLS_PER_SITE))
    silent: bool = False  # DescribeSite failed as well


class Bridges:
    """Calls to all bridges. A reconciliation that waits for one releases its worker slot."""

    def __init__(self, channels: BridgeChannels, clock: Clock) -> None:
        self._channels = channels
        self._clock = clock
        self._states: dict[str, _SiteState] = {}

    async def ensure(
        self, site: str, key: str, spec: pb.PoolSpec, credentials: Credentials, code: Mapping[str, bytes]
    ) -> PoolView:
        """Request a pool from the site. ``code``: files by name."""
        request = pb.EnsurePoolRequest(key=key, spec=spec)
        request.spec.code.update(code)
        request.spec.federation.ca_certificate = credentials.ca
        request.spec.federation.certificate = credentials.certificate
        request.spec.federation.private_key = credentials.key
        answer = await self._call(site, "EnsurePool", lambda stub: stub.EnsurePool(request, timeout=CALL_SECONDS))
        return self._view(answer, spec.attempt)

    async def get(self, site: str, key: str, attempt: int, first: int = 0) -> PoolView:
        """Return the state of a pool's array whose first client is ``first``; ABSENT if the site does not know it."""
        request = pb.GetPoolRequest(key=key)
        try:
            answer = await self._call(site, "GetPool", lambda stub: stub.GetPool(request, timeout=CALL_SECONDS))
        except _NotFoundError:
            return PoolView(attempt, PoolPhase.ABSENT)
        return self._view(answer, attempt, first)

    async def cancel(self, site: str, key: str, attempt: int, reason: str) -> PoolView:
        """Cancel a pool at the site."""
        request = pb.CancelPoolRequest(key=key, reason=reason)
        answer = await self._call(site, "CancelPool", lambda stub: stub.CancelPool(request, timeout=CALL_SECONDS))
        return self._view(answer, attempt)

    async def renew(self, site: str, key: str, credentials: Credentials) -> None:
        """Send new credentials for a pool's clients to the site. Bridges that are too old for this are not retried."""
        request = pb.RenewCredentialsRequest(
            key=key, ca_certificate=credentials.ca, certificate=credentials.certificate, private_key=credentials.key
        )
        try:
            await self._call(
                site, "RenewCredentials", lambda stub: stub.RenewCredentials(request, timeout=CALL_SECONDS)
            )
        except _UnknownCallError:
            log.warning("the bridge of site %s is too old to renew the certificates of running pools", site)

    async def shrink(self, site: str, key: str, replicas: int) -> None:
        """Cancel a pool's clients at the site, except for the first ``replicas``."""
        request = pb.ShrinkPoolRequest(key=key, replicas=replicas)
        await self._call(site, "ShrinkPool", lambda stub: stub.ShrinkPool(request, timeout=CALL_SECONDS))

    async def tail(self, site: str, key: str, index: int, lines: int) -> bytes:
        """Return the end of one task's log. ``lines``: 0 for the site's default."""
        request = pb.TailLogRequest(key=key, index=index, lines=lines)

        async def read(stub: "BridgeAsyncStub") -> bytes:
            return b"".join([chunk.data async for chunk in stub.TailLog(request, timeout=CALL_SECONDS)])

        return await self._call(site, "TailLog", read)

    async def describe(self, site: str) -> pb.Site:
        """Return the site's description, even if its breaker is open; raise if the breaker stays open after that."""
        state = self._state(site)
        try:
            async with slot_released():
                answer = await self._invoke(
                    site, "DescribeSite", lambda stub: stub.DescribeSite(pb.DescribeSiteRequest(), timeout=CALL_SECONDS)
                )
        except BridgeError as error:
            if isinstance(error, _SilentError):
                state.silent = True
                self._failed(site, state, str(error))
            raise
        if state.silent or state.breaker.overdue > _FORGIVEN_AFTER:
            state.silent = False
            self._succeeded(site, state)
        if state.breaker.is_open:
            message = f"{site} describes itself, but did not respond to its last calls ({state.breaker.last_error})"
            raise BridgeError(ProblemKind.UNREACHABLE, message)
        return answer

    async def close(self) -> None:
        """Close every channel."""
        await self._channels.close()

    async def forget(self, site: str) -> None:
        """Forget a site that is gone, and close its channel."""
        self._states.pop(site, None)
        with suppress(KeyError):
            CIRCUIT_OPEN.remove(site)
        await self._channels.forget(site)

    def _state(self, site: str) -> _SiteState:
        return self._states.setdefault(site, _SiteState())

    async def _call(self, site: str, method: str, call: "Callable[[BridgeAsyncStub], Awaitable[Answer]]") -> Answer:
        state = self._state(site)
        async with slot_released(), self._admitted(site, state):
            try:
                answer = await self._invoke(site, method, call)
            except BridgeError as error:
                if isinstance(error, _SilentError):
                    self._failed(site, state, f"{method}: {error}")
                elif isinstance(error, _AnsweredError) or error.kind is not ProblemKind.UNREACHABLE:
                    self._succeeded(site, state)
                raise
            self._succeeded(site, state)
            return answer

    @asynccontextmanager
    async def _admitted(self, site: str, state: _SiteState) -> AsyncIterator[None]:
        """Hold one of the site's call slots. Raises :class:`BridgeError` at once if its breaker is open."""
        self._check(site, state)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await state.calls.acquire()
        except TimeoutError:
            message = f"{site} is slow: {_CALLS_PER_SITE} calls to it are in progress"
            raise BridgeError(ProblemKind.UNREACHABLE, message) from None
        try:
            probe = state.breaker.is_open
            if not state.breaker.admits():
                raise _open(site, state.breaker)
            try:
                yield
            finally:
                if probe:
                    state.breaker.abandoned()
        finally:
            state.calls.release()

    def _check(self, site: str, state: _SiteState) -> None:
        if state.breaker.is_open and (state.breaker.seconds_left() or state.calls.locked()):
            raise _open(site, state.breaker)

    def _failed(self, site: str, state: _SiteState, words: str) -> None:
        if state.breaker.failed(words):
            CIRCUIT_OPEN.labels(site).set(1)
            log.warning("site %s did not respond several times (%s); pausing calls to it", site, words)

    def _succeeded(self, site: str, state: _SiteState) -> None:
        if state.breaker.succeeded():
            log.info("site %s responds again", site)
        CIRCUIT_OPEN.labels(site).set(0)

    async def _invoke(self, site: str, method: str, call: "Callable[[BridgeAsyncStub], Awaitable[Answer]]") -> Answer:
        started, code = time.monotonic(), "OK"
        try:
            stub = await self._channels.stub(site)
            return await call(stub)
        except BridgeError:
            code = "NO_CREDENTIALS"
            raise
        except aio.AioRpcError as error:
            code = error.code().name
            raise _translated(error, time.monotonic() - started) from None
        finally:
            BRIDGE_CALLS.labels(site, method, code).inc()
            BRIDGE_SECONDS.labels(site, method).observe(time.monotonic() - started)

    def _view(self, pool: pb.Pool, attempt: int, first: int = 0) -> PoolView:
        # To the minute: responses take time, and the times in the status must not vary with that.
        theirs = _moment(pool.now, 0.0)
        ahead = 60.0 * round((theirs - self._clock.now().timestamp()) / 60) if theirs else 0.0
        return pool_view(pool, attempt, first, ahead)


class CircuitOpenError(BridgeError):
    """The site did not respond to earlier calls and is not called for now."""


class _SilentError(BridgeError):
    """The bridge did not respond."""


class _AnsweredError(BridgeError):
    """The bridge responded with an error."""


class _NotFoundError(_AnsweredError):
    pass


class _UnknownCallError(_AnsweredError):
    """The bridge is too old for the call."""


def pool_view(pool: pb.Pool, attempt: int, first: int = 0, ahead: float = 0.0) -> PoolView:
    """Reduce a bridge's response to what the plan reads. ``ahead``: seconds by which the site's clock is ahead."""
    failed = [task for task in pool.tasks if task.log_tail or task.exit_code or task.signal]
    unsuccessful = [task.state for task in pool.tasks if meaning(task.state) in (Meaning.FAILED, Meaning.CANCELLED)]
    failure = ""
    if failed:
        task = failed[-1]
        how = f"signal {task.signal}" if task.signal else f"exit code {task.exit_code}"
        failure = f"task {first + task.index} {task.state} ({how})\n{last_lines(task.log_tail)}".rstrip()
    name = pb.Pool.Phase.Name(pool.phase)
    return PoolView(
        attempt=attempt,
        phase=PoolPhase(name) if name in PoolPhase.__members__ else PoolPhase.UNKNOWN,
        message=one_line(pool.message),
        job_id=pool.slurm_job_id,
        queued=pool.queued,
        running=pool.running,
        succeeded=pool.succeeded,
        failed=pool.failed,
        reason=one_line(pool.reason, 100),
        expected_start=_moment(pool.expected_start, ahead),
        submitted_at=_moment(pool.submitted_at, ahead),
        failure=failure,
        timed_out=pool.time_limit_reached,
        displaced=bool(unsuccessful) and DISPLACED.issuperset(unsuccessful),
        desired=pool.desired,
        ends_at=_moment(pool.ends_at, ahead),
    )


def _moment(theirs: float, ahead: float) -> float:
    """Convert a site's time to the operator's clock; return 0 if it is missing or invalid."""
    ours = theirs - ahead if theirs else 0.0
    return ours if 0.0 < ours < LAST_SECOND else 0.0


def _translated(error: aio.AioRpcError, seconds: float) -> BridgeError:
    details = one_line(error.details() or "")
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return _NotFoundError(ProblemKind.REFUSED, details)
    if error.code() in _DENIED:
        return BridgeError(ProblemKind.DENIED, details)
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return _UnknownCallError(ProblemKind.REFUSED, details)
    if error.code() in _REFUSED:
        return BridgeError(ProblemKind.REFUSED, details)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Temporary: the call is repeated, as if the site could not be reached.
        policy = details.startswith(_POLICY)
        return _AnsweredError(ProblemKind.UNREACHABLE, details, Reason.POLICY_DENIED if policy else None)
    message = f"{error.code().name}: {details}"
    if error.code() not in _NO_ANSWER:
        return _AnsweredError(ProblemKind.UNREACHABLE, message)
    silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED or seconds >= _SLOW_SECONDS
    return (_SilentError if silent else BridgeError)(ProblemKind.UNREACHABLE, message)


def _open(site: str, breaker: CircuitBreaker) -> CircuitOpenError:
    message = f"{site} did not respond to its last calls ({breaker.last_error}); it is retried from time to time"
    return CircuitOpenError(ProblemKind.UNREACHABLE, message)
