"""The bridge's Prometheus metrics."""

from collections.abc import Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus_contracts.wire.addresses import split
from isthmus_contracts.wire.http_server import serve_metrics

from . import __version__

_WAITS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400, 3 * 86400, 7 * 86400)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.submissions = Counter(
            "isthmus_bridge_submissions_total", "Runs of sbatch by result: accepted, refused, deferred, ambiguous",
            ["result"], registry=r,
        )  # fmt: skip
        # Start at 0, so that the first one shows in a rate.
        for result in ("accepted", "refused", "deferred", "ambiguous"):
            self.submissions.labels(result)
        self.adoptions = Counter(
            "isthmus_bridge_adoptions_total", "Arrays found in Slurm after an ambiguous submission", registry=r
        )
        self.extras = Counter(
            "isthmus_bridge_extra_arrays_cancelled_total", "Arrays cancelled because their pool has another or is over",
            registry=r,
        )  # fmt: skip
        self.lookup_failures = Counter(
            "isthmus_bridge_lookup_failures_total", "Look-ups in Slurm that failed", registry=r
        )
        self.denials = Counter(
            "isthmus_bridge_denials_total", "Requests that the site's policy denied", ["rule"], registry=r
        )
        self.requests = Counter(
            "isthmus_bridge_requests_total", "Requests by method and gRPC status", ["method", "code"], registry=r
        )
        self.pools = Gauge("isthmus_bridge_pools", "Pools that are not over, by journal state", ["state"], registry=r)
        self.tasks = Gauge(
            "isthmus_bridge_tasks", "Tasks of the pools that are not over, by the meaning of their Slurm state",
            ["state"], registry=r,
        )  # fmt: skip
        self.jobs_without_pool = Gauge(
            "isthmus_bridge_jobs_without_pool", "Live jobs without a pool, of a user whose jobs the bridge submits",
            ["user"], registry=r,
        )  # fmt: skip
        self.slurm_up = Gauge("isthmus_bridge_slurm_up", "1 while Slurm answers polls of the queue, else 0", registry=r)
        self.last_poll = Gauge(
            "isthmus_bridge_last_poll_timestamp_seconds", "Time of the last successful poll of the queue", registry=r
        )
        self.commands = Histogram(
            "isthmus_bridge_slurm_command_seconds", "Run time of Slurm's programs", ["program"],
            buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self.command_failures = Counter(
            "isthmus_bridge_slurm_command_failures_total", "Runs of Slurm's programs that failed", ["program"],
            registry=r,
        )  # fmt: skip
        self.queue_wait = Histogram(
            "isthmus_bridge_queue_wait_seconds", "Time from a pool's submission to the start of each task",
            buckets=_WAITS, registry=r,
        )  # fmt: skip

        self.relay_connections = Gauge("isthmus_bridge_relay_connections", "Connections open in the relay", registry=r)
        self.relay_bytes = Counter(
            "isthmus_bridge_relay_bytes_total", "Bytes relayed: to-aggregator, to-client", ["direction"],
            registry=r,
        )  # fmt: skip
        self.relay_refused = Counter(
            "isthmus_bridge_relay_refused_total",
            "Connections that the relay refused or closed: unknown, limit, unreachable, not-tls, timeout", ["reason"],
            registry=r,
        )  # fmt: skip
        self.gateway_connected = Gauge(
            "isthmus_bridge_gateway_connected", "1 while the tunnel to a gateway is up, else 0", ["gateway"], registry=r
        )
        self.gateway_tunnels = Counter(
            "isthmus_bridge_gateway_tunnels_total", "Attempts to open a tunnel, by result: lost, failed",
            ["gateway", "result"], registry=r,
        )  # fmt: skip
        self.certificate_expiry = Gauge(
            "isthmus_bridge_certificate_expiry_timestamp_seconds", "Expiry of the bridge's own certificate", registry=r
        )
        self.policy_current = Gauge(
            "isthmus_bridge_policy_current",
            "1 while the last read policy is in force, 0 after a failed reload", registry=r,
        )  # fmt: skip
        self.policy_current.set(1)
        self.info = Gauge("isthmus_bridge_info", "Always 1; has the version as a label", ["version"], registry=r)
        self.info.labels(__version__).set(1)

    def command(self, program: str, seconds: float, good: bool) -> None:
        """Record one run of one of Slurm's programs."""
        self.commands.labels(program).observe(seconds)
        if not good:
            self.command_failures.labels(program).inc()

    def count(self, gauge: Gauge, known: Iterable[str], counts: dict[str, int]) -> None:
        """Set a gauge by state; states without a count become 0."""
        for state in known:
            gauge.labels(state).set(counts.get(state, 0))

    def serve(self, address: str, site: str) -> WSGIServer:
        """Serve /metrics at host:port until the server is shut down. Raises ``OSError``."""
        labelled = CollectorRegistry(auto_describe=False)
        labelled.register(_OfSite(self.registry, site))
        return serve_metrics(make_wsgi_app(labelled), *split(address))


class _OfSite(Collector):
    """Collector that adds the label ``site`` to every sample, since one Prometheus may scrape many sites."""

    def __init__(self, registry: CollectorRegistry, site: str) -> None:
        self._registry = registry
        self._label = {"site": site}

    def collect(self) -> Iterable[Metric]:
        """Yield the registry's families with the label."""
        for family in self._registry.collect():
            family.samples = [sample._replace(labels={**self._label, **sample.labels}) for sample in family.samples]
            yield family
