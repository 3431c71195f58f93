"""``python -m isthmus.aggregator``: serve one job until it is complete.

Exit codes: 0 complete; 1 failed for good, or an unexpected error; 75 its port is taken; 143 stopped by SIGTERM. After
an unexpected error, 75 and 143 a restarted aggregator resumes the job.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

# Before gRPC is loaded: callers could make it write to stderr without limit.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from grpc import aio
from prometheus_client import make_wsgi_app

from isthmus_contracts.manifests.manifest import ManifestError
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.process import files, open_files
from isthmus_contracts.process.log_limit import limit_root
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.addresses import split
from isthmus_contracts.wire.http_server import serve_metrics
from isthmus_contracts.wire.transport import HEADER_BYTES, renewed_server_credentials, server_options

from ..malloc_tuning import tune_malloc
from ..strategies import StrategyError, make_strategy
from .app import Aggregator
from .clients.membership import Membership
from .exits import EXIT_PORT_TAKEN
from .job import load_job
from .rounds.privacy_budget import protect
from .rpc.connections import CONNECTIONS_OF_EACH
from .storage.checkpoints import CheckpointError, CheckpointStore
from .telemetry.metrics import AggregatorMetrics
from .telemetry.tracking.tracker import make_tracker
from .termination import termination_message

log = logging.getLogger("isthmus.aggregator")

T = TypeVar("T")

# Longest wait after completion for the clients to disconnect, and for an observer to read the status. Seconds.
CLOSE_SECONDS = 15.0
LINGER_SECONDS = 30.0
# Longest time for tracking sinks to write their queues: at the end, and when stopped, where the process must exit
# within a pod's grace period. Seconds.
TRACKING_SECONDS = 30.0
TRACKING_SECONDS_WHEN_STOPPED = 5.0
# Connections besides those of clients: of observers and unknown callers.
_FURTHER_CONNECTIONS = 512
# A client makes three or four calls at a time. The memory that a hostile one can occupy by headers grows with them.
_CALLS_OF_A_CONNECTION = 8
# Longest text of an unexpected error. Characters.
_LONGEST_ERROR = 500


class PortTakenError(Exception):
    """A port is in use by another program. ``str()`` is one line."""


def main() -> None:
    """Parse the command line and serve."""
    os.umask(0o077)  # other users of the machine must not read models and records
    parser = argparse.ArgumentParser(prog="python -m isthmus.aggregator", description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="job file: JSON with name, namespace, uid and spec")
    parser.add_argument("--former-job", default="", help="uid of an earlier job whose checkpoints are continued")
    parser.add_argument("--tls", type=Path, required=True, help="directory with ca.crt, tls.crt and tls.key")
    parser.add_argument("--state", type=Path, required=True, help="directory of the checkpoints and the final model")
    parser.add_argument("--listen", default="127.0.0.1:7443", help="host:port of the gRPC service; port 0 picks one")
    parser.add_argument("--metrics", default="127.0.0.1:9090", help="host:port of /metrics; port 0 picks one")
    parser.add_argument("--ports-file", type=Path, help="file for the port numbers, as JSON, written once it listens")
    parser.add_argument("--termination-log", type=Path, default=Path("/dev/termination-log"),
                        help="file for the final status, if it exists")  # fmt: skip
    parser.add_argument("--wait-for", type=int, default=0, metavar="CLIENTS",
                        help="clients to wait for before the first round, if more than the quorum")  # fmt: skip
    parser.add_argument("--stay", action="store_true",
                        help="keep serving after completion, until SIGTERM, to tell late clients to stop")  # fmt: skip
    arguments = parser.parse_args()
    tune_malloc()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    limit_root()
    try:
        sys.exit(asyncio.run(serve(arguments)))
    except (ManifestError, CheckpointError, StrategyError) as error:
        status = pb.FederationStatus(phase=pb.FederationStatus.FAILED, message=str(error))
        _leave(arguments.termination_log, termination_message(status))
        print(f"isthmus.aggregator: {error}", file=sys.stderr)
        sys.exit(1)
    except PortTakenError as error:
        # No status, which would end the job: after a restart the port may be free.
        _leave(arguments.termination_log, str(error))
        print(f"isthmus.aggregator: {error}", file=sys.stderr)
        sys.exit(EXIT_PORT_TAKEN)
    except Exception as error:
        # No status, which would end the job: it may resume after a restart. Python writes the traceback, and exits
        # with 1.
        text = one_line(f"{type(error).__name__}: {error}", _LONGEST_ERROR)
        _leave(arguments.termination_log, f"unexpected error: {text}; see the aggregator's log")
        raise


async def serve(arguments: argparse.Namespace) -> int:
    """Serve until the job is complete or a signal arrives; return the exit code."""
    job = load_job(arguments.job)
    try:
        credentials = renewed_server_credentials(arguments.tls)
    except OSError as error:
        raise ManifestError([f"{error.filename}: {error.strerror}"]) from None
    metrics = AggregatorMetrics(job.namespace, job.name)
    store = CheckpointStore(arguments.state, job.uid, job.spec.checkpoints_kept, arguments.former_job)
    rule = make_strategy(job.spec.strategy, arguments.state, job.spec.most_trainers)
    strategy, budget = protect(job.spec, rule)
    tracker = make_tracker(job, arguments.state)
    aggregator = Aggregator(job, store, strategy, metrics, tracker, budget)
    coordinator = aggregator.coordinator
    coordinator.wait_for(arguments.wait_for)
    server = aio.server(
        options=[
            *server_options(_CALLS_OF_A_CONNECTION),
            ("grpc.max_receive_message_length", HEADER_BYTES),
            ("grpc.max_allowed_incoming_connections", _connections(job.spec.total_clients)),
        ]
    )
    server.add_generic_rpc_handlers((aggregator.service.handler(), aggregator.observer.handler()))
    port = _bound(arguments.listen, lambda: server.add_secure_port(arguments.listen, credentials))
    metrics_server = _serve_metrics(arguments.metrics, metrics)
    await server.start()
    if arguments.ports_file:
        ports = {"port": port, "metrics_port": metrics_server.server_address[1]}
        files.replace(arguments.ports_file, json.dumps(ports).encode())
    log.info("serving %s/%s on port %d", job.namespace, job.name, port)

    stopped = _stop_signals()
    training = asyncio.create_task(coordinator.run())
    watching = asyncio.create_task(aggregator.connections.watch(port))
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({training, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not training.done():
            log.info("stopped by a signal after round %d", aggregator.training.completed)
            coordinator.stop_all(pb.Stop.RESTARTING, "the aggregator was told to stop")
            return 143
        try:
            training.result()
        except StrategyError as error:
            coordinator.stop_all(pb.Stop.FAILED, str(error))
            tracker.fail(str(error))
            await _clients_gone(aggregator.members)  # a client without this message would retry for half an hour
            raise
        _leave(arguments.termination_log, termination_message(aggregator.reporter.status()))
        await (stopped.wait() if arguments.stay else _close(aggregator, stopped))
        return 0
    finally:
        for task in (training, stopping, watching):
            task.cancel()
        await server.stop(grace=1.0)
        in_time = not stopped.is_set() or (arguments.stay and training.done())
        await asyncio.to_thread(tracker.close, TRACKING_SECONDS if in_time else TRACKING_SECONDS_WHEN_STOPPED)
        metrics_server.shutdown()


def _bound(address: str, bind: Callable[[], T]) -> T:
    """Call ``bind``, which binds a port. Raise :class:`PortTakenError`."""
    try:
        return bind()
    except (RuntimeError, OSError) as error:
        raise PortTakenError(f"cannot listen on {address}: {error}") from None


def _serve_metrics(address: str, metrics: AggregatorMetrics) -> WSGIServer:
    """Serve ``/metrics``. Raise :class:`PortTakenError`."""
    host, port = split(address)
    application = make_wsgi_app(metrics.registry)
    return _bound(address, lambda: serve_metrics(application, host, port))


def _connections(clients: int) -> int:
    """Return the number of connections to allow, which must leave file descriptors for the aggregator's files."""
    wanted = CONNECTIONS_OF_EACH * clients + _FURTHER_CONNECTIONS
    room = open_files.connections_within(open_files.raise_limit(), wanted)
    if room < wanted:
        log.warning("room for %d connections only, not for %d: raise the limit of open files (ulimit -n)", room, wanted)
    return room


def _stop_signals() -> asyncio.Event:
    """Return an event that the signals SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def _close(aggregator: Aggregator, stopped: asyncio.Event) -> None:
    """Wait, for a limited time, until the clients have disconnected and an observer has read the complete status."""
    await _clients_gone(aggregator.members)
    seen = asyncio.create_task(aggregator.observer.completion_seen.wait())
    signalled = asyncio.create_task(stopped.wait())
    await asyncio.wait({seen, signalled}, timeout=LINGER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for task in (seen, signalled):
        task.cancel()


async def _clients_gone(members: Membership) -> None:
    """Wait until every client has disconnected, for a limited time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            while any(client.connected for client in members):  # noqa: ASYNC110 - a moment, at the very end
                await asyncio.sleep(0.05)


def _leave(path: Path, text: str) -> None:
    """Write the termination message if its file exists."""
    with suppress(OSError):
        if path.exists():
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
