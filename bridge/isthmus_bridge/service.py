"""The gRPC service on top of :class:`~.pools.pools.Pools`: identifies callers, and maps errors to gRPC statuses."""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import grpc

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.parties import PartyError
from isthmus_contracts.wire.transport import peer_uris

from . import __version__
from .files.run_directory import TAIL_LINES
from .metrics import Metrics
from .parties import signing_root
from .policy.authorization import Denial, accounts_of, data_sets_of, environments_of, identify, partitions_of
from .policy.current import CurrentPolicy
from .policy.policy import Identity, Policy
from .pools.audit_events import Auditor
from .pools.journal import Entry, State
from .pools.pool_status import to_pool
from .pools.pools import Denied, KeyTaken, NoSuchPool, NothingLeft, Pools, SpecDiffers, title
from .pools.spec_checks import RequestError
from .slurm.model import SlurmAdapter, SlurmError

log = logging.getLogger(__name__)

# EnsurePool waits at most this long for Slurm's answer, and CancelPool for the end of the pool. Seconds.
ANSWER_SECONDS = 10.0
MAX_TAIL_LINES = 1000
MAX_TAIL_BYTES = 256 * 1024
_CHUNK = 32 * 1024
# Maximum length of a caller's text in a log line's fields. Characters.
_SHOWN = 200

Context = grpc.ServicerContext

_UNFINISHED = (State.RESERVED, State.SUBMITTING)


class BridgeService(rpc.BridgeServicer):
    """The service of bridge.proto."""

    def __init__(
        self,
        current_policy: CurrentPolicy,
        pools: Pools,
        adapter: SlurmAdapter,
        metrics: Metrics,
        auditor: Auditor,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._current_policy = current_policy
        self._pools = pools
        self._adapter = adapter
        self._metrics = metrics
        self._auditor = auditor
        self._answer_seconds = answer_seconds

    @property
    def _policy(self) -> Policy:
        return self._current_policy.policy

    def EnsurePool(self, request: pb.EnsurePoolRequest, context: Context) -> pb.Pool:
        """Make the pool exist."""
        with self._call("EnsurePool", context, request.key, title(request.spec)) as caller:
            entry = self._pools.ensure(caller, request.key, request.spec)
            if entry.state in _UNFINISHED:
                entry = self._wait(entry, lambda e: e.state not in _UNFINISHED or bool(e.message), context)
            return _reply(entry)

    def GetPool(self, request: pb.GetPoolRequest, context: Context) -> pb.Pool:
        """Return one pool."""
        with self._call("GetPool", context, request.key) as caller:
            return _reply(self._pools.get(caller, request.key))

    def CancelPool(self, request: pb.CancelPoolRequest, context: Context) -> pb.Pool:
        """End a pool."""
        with self._call("CancelPool", context, request.key) as caller:
            entry = self._pools.cancel(caller, request.key, request.reason)
            if not entry.state.over:
                entry = self._wait(entry, lambda e: e.state.over, context)
            return _reply(entry)

    def ShrinkPool(self, request: pb.ShrinkPoolRequest, context: Context) -> pb.Pool:
        """End the last clients of a pool."""
        with self._call("ShrinkPool", context, request.key) as caller:
            return _reply(self._pools.shrink(caller, request.key, request.replicas))

    def RenewCredentials(self, request: pb.RenewCredentialsRequest, context: Context) -> pb.Pool:
        """Replace the credentials of a pool's clients."""
        with self._call("RenewCredentials", context, request.key) as caller:
            return _reply(self._pools.renew(caller, request))

    def TailLog(self, request: pb.TailLogRequest, context: Context) -> Iterator[pb.LogChunk]:
        """Stream the last lines of one task's log."""
        with self._call("TailLog", context, request.key) as caller:
            entry = self._pools.get(caller, request.key)
            # Clients that were removed by shrinking have logs, too.
            replicas = pb.PoolSpec.FromString(entry.spec).replicas
            if request.index >= replicas:
                raise RequestError("index", f"must be below {replicas}, not {request.index}")
            lines = min(request.lines or TAIL_LINES, MAX_TAIL_LINES)
            text = self._pools.tail(entry, request.index, lines, MAX_TAIL_BYTES)
            data = text.encode()
            for start in range(0, len(data), _CHUNK):
                yield pb.LogChunk(data=data[start : start + _CHUNK])

    def DescribeSite(self, request: pb.DescribeSiteRequest, context: Context) -> pb.Site:
        """Return what the caller may use here."""
        with self._call("DescribeSite", context) as caller:
            description = self._adapter.describe()
            return pb.Site(
                name=self._policy.site,
                slurm_version=description.version,
                cluster=description.cluster,
                partitions=partitions_of(self._policy, caller),
                environments=sorted(environments_of(self._policy, caller)),
                accounts=accounts_of(self._policy, caller),
                data_sets=sorted(data_sets_of(self._policy, caller)),
                bridge_version=__version__,
                signing_root=self._signing_root(),
            )

    def _signing_root(self) -> str:
        try:
            return signing_root.public(self._policy.tls_dir)
        except (OSError, PartyError) as error:
            log.error("cannot read this site's root for secure aggregation: %s", error)
            return ""

    def _wait(self, entry: Entry, done: Callable[[Entry], bool], context: Context) -> Entry:
        left = context.time_remaining()
        # Answer before the caller gives up.
        timeout = self._answer_seconds if left is None else min(self._answer_seconds, max(0.0, left * 0.8))
        return self._pools.wait(entry.key, done, timeout) or entry

    @contextmanager
    def _call(self, method: str, context: Context, key: str = "", pool: str = "") -> Iterator[Identity]:
        """Yield the caller's identity, and turn exceptions into gRPC statuses.

        Log lines about the call name its ``key`` and ``pool``, which come from the caller unchecked.
        """
        code = grpc.StatusCode.OK
        fields = {"method": method}
        if key:
            fields["key"] = one_line(key, _SHOWN)
        if pool:
            fields["pool"] = one_line(pool, _SHOWN)
        try:
            uris = peer_uris(context)
            fields["caller"] = one_line(", ".join(uris), _SHOWN)
            caller = self._identify(uris)
            fields["caller"] = caller.uri
            yield caller
        except Exception as error:
            code, message = self._status(fields, error)
            _abort(context, code, message)
        finally:
            self._metrics.requests.labels(method, code.name).inc()

    def _identify(self, uris: Sequence[str]) -> Identity:
        caller = identify(self._policy, uris)
        if isinstance(caller, Denial):
            raise Denied(caller)
        return caller

    def _status(self, fields: Mapping[str, str], error: Exception) -> tuple[grpc.StatusCode, str]:
        match error:
            case RequestError():
                return grpc.StatusCode.INVALID_ARGUMENT, str(error)
            case Denied():
                self._metrics.denials.labels(error.denial.rule).inc()
                log.warning("denied: %s", error, extra=fields)
                job, _, pool = fields.get("pool", "").rpartition("/")
                self._auditor.denied(
                    fields["caller"], error.denial, key=fields.get("key", ""), job=job, pool=pool,
                    transient=error.transient,
                )  # fmt: skip
                transient = grpc.StatusCode.RESOURCE_EXHAUSTED
                return transient if error.transient else grpc.StatusCode.PERMISSION_DENIED, str(error)
            case NoSuchPool():
                return grpc.StatusCode.NOT_FOUND, f"no pool {error} at site {self._policy.site}"
            case KeyTaken():
                return grpc.StatusCode.ALREADY_EXISTS, f"key {error} belongs to another caller"
            case SpecDiffers() | NothingLeft():
                return grpc.StatusCode.FAILED_PRECONDITION, str(error)
            case SlurmError():
                return grpc.StatusCode.UNAVAILABLE, f"Slurm does not answer: {error}"
            case OSError():
                # A problem of the site (a full disk), which may pass.
                log.exception("request failed", extra=fields)
                return grpc.StatusCode.UNAVAILABLE, f"the site's bridge failed: {error.strerror}"
            case sqlite3.OperationalError():
                # Likewise for the journal's disk. Nothing was recorded, so nothing was started.
                log.exception("request failed", extra=fields)
                return grpc.StatusCode.UNAVAILABLE, f"the site's bridge cannot write its journal: {error}"
            case _:
                log.exception("request failed", extra=fields)
                return grpc.StatusCode.INTERNAL, "internal error of the bridge; see its log"


def _reply(entry: Entry) -> pb.Pool:
    """Return the pool's message with the bridge's current time, to which its times refer."""
    pool = to_pool(entry)
    pool.now = time.time()
    return pool


def _abort(context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)
    raise AssertionError("abort() raises")
