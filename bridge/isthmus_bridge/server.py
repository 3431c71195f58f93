"""The running bridge: journal, Slurm adapter, submitter, reconciler, gRPC server and metrics together."""

import datetime as dt
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc

from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from isthmus_contracts.wire.pki import Credentials, expiry
from isthmus_contracts.wire.transport import SERVER_OPTIONS, renewed_server_credentials

from .admin.orders import execute
from .audit.log import AuditLog
from .metrics import Metrics
from .network.dialout import DialOut
from .network.handshake_guard import HandshakeGuard
from .network.relay.server import Relay, Route, routes
from .policy.current import CurrentPolicy
from .policy.policy import Policy, PolicyError
from .pools.audit_events import Auditor, nothing_relayed
from .pools.housekeeping import clean_up
from .pools.journal import Journal
from .pools.pools import Pools
from .pools.reconciler import Reconciler
from .pools.submitter import Submitter
from .service import BridgeService
from .slurm.model import SlurmAdapter
from .slurm_adapters import slurm_adapter

log = logging.getLogger(__name__)

_SUBMIT_THREADS = 4
_REQUEST_THREADS = 16
_STOP_SECONDS = 5.0
_SIGNAL_SECONDS = 0.25
# Interval of polling for the admin's orders.
_ORDER_SECONDS = 1.0
_HOUSEKEEPING_SECONDS = 3600.0
# Interval of updates of the certificate metric; new connections get renewed certificates at once.
_CERTIFICATE_SECONDS = 60.0
_MAX_MESSAGE = 4 << 20
_SOCKET = "bridge.sock"
_LONGEST_FOLDER = 70


class ServerError(Exception):
    """The bridge cannot start. ``str()`` is one line."""


class Dispatcher:
    """Threads that run a function for queued keys. A key that is already queued is not queued again."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="submit")
        self._queued: set[str] = set()
        self._lock = threading.Lock()
        self.function: Callable[[str], None] = lambda key: None

    def __call__(self, key: str) -> None:
        """Queue a key."""
        with self._lock:
            if key in self._queued:
                return
            self._queued.add(key)
        try:
            self._pool.submit(self._run, key)
        except RuntimeError:  # shutting down: the next bridge continues
            with self._lock:
                self._queued.discard(key)

    def _run(self, key: str) -> None:
        with self._lock:
            self._queued.discard(key)
        try:
            self.function(key)
        except Exception:
            log.exception("processing the pool failed", extra={"key": key})

    def close(self) -> None:
        """Drop queued keys, and wait for running calls: an sbatch that has started may finish."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Bridge:
    """A running bridge."""

    def __init__(self, policy: Policy, adapter: SlurmAdapter | None = None) -> None:
        """Open the journal and the audit log. Raises ``OSError``, ``JournalError`` and :class:`ServerError`."""
        self.metrics = Metrics()
        self._policy = policy
        self.current_policy = CurrentPolicy(policy)
        policy.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._adapter = adapter or slurm_adapter(policy, self.metrics.command)
        self._journal = Journal(policy.journal_path)
        self._relay = Relay(policy.relay, self._route, self.metrics) if policy.relay else None
        try:
            self._audit_log = AuditLog(policy.audit_path)
        except OSError as error:
            raise ServerError(f"audit_log {policy.audit_path}: {error.strerror}") from None
        relayed = nothing_relayed if self._relay is None else self._relay.forwarded
        self.auditor = auditor = Auditor(self._audit_log, relayed=relayed)
        self._dispatch = Dispatcher(_SUBMIT_THREADS)
        submitter = Submitter(self.current_policy, self._journal, self._adapter, self.metrics, auditor, time.time)
        self._dispatch.function = submitter.advance
        self._reconciler = Reconciler(
            policy, self._journal, self._adapter, submitter, self.metrics, auditor, self._dispatch
        )
        self.pools = Pools(self.current_policy, self._journal, auditor, self._dispatch, self._reconciler.wake.set)
        self._service = BridgeService(self.current_policy, self.pools, self._adapter, self.metrics, auditor)
        self._dial_out = (
            DialOut(policy.gateways, policy.site, policy.tls_dir, self.metrics) if policy.gateways else None
        )
        # Holds the gRPC server's socket; only the bridge's user can enter it.
        self._socket_dir: tempfile.TemporaryDirectory[str] | None = None
        self._socket = Path()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._requests = ThreadPoolExecutor(_REQUEST_THREADS, thread_name_prefix="rpc")
        self._server: grpc.Server | None = None
        self._guard: HandshakeGuard | None = None
        self.port = 0

    def start(self) -> None:
        """Start to serve. Raises :class:`ServerError`."""
        self.auditor.policy_in_force(self._policy)
        clean_up(self._policy, self._journal, self.auditor, time.time())
        server = grpc.server(
            self._requests,
            options=[*SERVER_OPTIONS, ("grpc.max_receive_message_length", _MAX_MESSAGE)],
        )
        rpc.add_BridgeServicer_to_server(self._service, server)
        inbound = self._policy.inbound
        try:
            ends = self._update_certificate_expiry()
            # Connections of callers come through the handshake guard, those of tunnels through dial-out.
            self._socket_dir = tempfile.TemporaryDirectory(prefix="isthmus-bridge-", dir=_short_folder())
            self._socket = path = Path(self._socket_dir.name) / _SOCKET
            server.add_secure_port(f"unix:{path}", renewed_server_credentials(self._policy.tls_dir))
        except (OSError, ValueError, RuntimeError) as error:
            raise ServerError(f"cannot serve with {self._policy.tls_dir}: {error}") from None
        if self._policy.metrics_listen:
            try:
                self.metrics.serve(self._policy.metrics_listen, self._policy.site)
            except OSError as error:
                raise ServerError(f"cannot serve metrics at {self._policy.metrics_listen}: {error.strerror}") from None
        if self._relay is not None and self._policy.relay is not None:
            try:
                self._relay.start()
            except OSError as error:
                raise ServerError(f"cannot relay at {self._policy.relay.listen}: {error.strerror}") from None
        server.start()
        if inbound is not None:
            guard = HandshakeGuard(inbound, path)
            try:
                guard.start()
            except OSError as error:
                server.stop(None)
                raise ServerError(f"cannot serve at {inbound}: {error.strerror}") from None
            self._guard, self.port = guard, guard.port
        self._server = server
        for target in (self._reconcile, self._housekeep):
            thread = threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            thread.start()
            self._threads.append(thread)
        if self._dial_out is not None:
            self._dial_out.start(path)
        listen = f"{inbound.rpartition(':')[0]}:{self.port}" if inbound else None
        log.info(
            "serving", extra={"listen": listen, "gateways": [gateway.address for gateway in self._policy.gateways],
                              "site": self._policy.site, "certificate_until": ends.isoformat()},
        )  # fmt: skip

    def stop(self) -> None:
        """Stop. Slurm's jobs keep running; submissions under way finish and are recorded."""
        if self._relay is not None:
            self._relay.stop()
        if self._server is not None:
            self._server.stop(_STOP_SECONDS).wait()
        # Only now, when calls under way have been answered.
        if self._guard is not None:
            self._guard.stop()
        if self._dial_out is not None:
            self._dial_out.stop()
        if self._socket_dir is not None:
            self._socket_dir.cleanup()
        # The handler of a cancelled call may still be running, and use the journal.
        self._requests.shutdown(wait=True)
        self._stop.set()
        self._reconciler.wake.set()
        self._dispatch.close()
        for thread in self._threads:
            thread.join()
        self._journal.close()
        self._audit_log.close()
        log.info("stopped")

    def execute_orders(self) -> None:
        """Execute the orders of the admin; see :mod:`.admin.orders`."""
        try:
            execute(self._policy.journal_path, self.pools.end_all)
        except Exception:
            log.exception("an order was not executed")

    @property
    def restart_reason(self) -> str:
        """The reason to restart the bridge: a file that it needs was removed. Empty if there is none."""
        if self._journal.removed:
            path = self._policy.journal_path
            return f"the journal {path} was removed, and is written again; exempt it from the cleanup of old files"
        if self._socket.exists():
            return ""
        why = "was removed, and no caller can connect without it"
        return f"{self._socket} {why}; exempt it from the cleanup of its folder"

    def touch_socket(self) -> None:
        """Update the socket's times, so that cleaners of temporary folders do not take it for an old file."""
        for path in (self._socket.parent, self._socket):
            with suppress(OSError):
                os.utime(path)

    @property
    def relay_port(self) -> int:
        """The port of the relay; 0 if there is none."""
        return self._relay.port if self._relay is not None else 0

    def _route(self, server_name: str) -> Route | None:
        """Return the relay's route for a server name, or ``None``."""
        specs = (entry.pool_spec() for entry in self._journal.live() if entry.spec)
        relayed = (
            (spec.federation.server_name, spec.federation.endpoint, spec.replicas)
            for spec in specs
            if spec.federation.via_bridge
        )
        return routes(relayed).get(server_name)

    def _update_certificate_expiry(self) -> dt.datetime:
        """Return when the bridge's certificate expires, and set the metric. Raises ``OSError`` and ``ValueError``."""
        ends = expiry(Credentials.read(self._policy.tls_dir).certificate)
        self.metrics.certificate_expiry.set(ends.timestamp())
        return ends

    def _reconcile(self) -> None:
        self._reconciler.run(self._stop)

    def _housekeep(self) -> None:
        due = time.monotonic() + _HOUSEKEEPING_SECONDS
        while not self._stop.wait(_CERTIFICATE_SECONDS):
            self.touch_socket()
            try:
                self._update_certificate_expiry()
            except (OSError, ValueError) as error:
                log.error("the certificate in %s cannot be read: %s", self._policy.tls_dir, error)
            if time.monotonic() < due:
                continue
            due = time.monotonic() + _HOUSEKEEPING_SECONDS
            try:
                clean_up(self.current_policy.policy, self._journal, self.auditor, time.time())
            except Exception:
                log.exception("housekeeping failed")


def _short_folder() -> str:
    """Return a folder for the socket: its whole path may have at most 107 characters."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < _LONGEST_FOLDER else "/tmp"  # noqa: S108


def serve(policy: Policy, reread: Callable[[], Policy]) -> None:
    """Serve until SIGTERM or SIGINT; on SIGHUP, put the policy that ``reread`` returns in force.

    Raises :class:`ServerError`, :class:`~.pools.journal.JournalError`.
    """
    stop, hangup = threading.Event(), threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: hangup.set())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        bridge = Bridge(policy)
    except OSError as error:
        raise ServerError(f"run_dir {policy.run_dir}: {error.strerror}") from None
    bridge.start()
    due = 0.0
    # Wait in short steps: a signal that another thread receives does not wake this one, which runs Python's handlers.
    while not stop.wait(_SIGNAL_SECONDS):
        if hangup.is_set():
            hangup.clear()
            _reload(bridge.current_policy, reread, bridge.metrics, bridge.auditor)
        if time.monotonic() >= due:
            due = time.monotonic() + _ORDER_SECONDS
            bridge.execute_orders()
            if cause := bridge.restart_reason:
                bridge.stop()
                # A restarted bridge creates the file again; Slurm's jobs are not affected.
                raise ServerError(cause)
    bridge.stop()


def _reload(current_policy: CurrentPolicy, reread: Callable[[], Policy], metrics: Metrics, auditor: Auditor) -> None:
    try:
        changed = current_policy.replace(reread())
    except PolicyError as error:
        metrics.policy_current.set(0)
        log.error("the policy was not reloaded: %s", error)
    else:
        metrics.policy_current.set(1)
        auditor.policy_in_force(current_policy.policy, changed)
        log.info("the policy was reloaded; changed: %s", ", ".join(changed) or "nothing")
