"""Metrics of the operator: at most one series per job, pool and state, and never one per client."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from isthmus_contracts.api.federated_job_status import Phase

from . import __version__

REGISTRY = CollectorRegistry()

API_REQUESTS = Counter(
    "isthmus_operator_api_requests", "Requests to the API server.", ["method", "code"], registry=REGISTRY
)
RECONCILE_SECONDS = Histogram(
    "isthmus_operator_reconcile_seconds",
    "Duration of one reconciliation of one job.",
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
RECONCILE_ERRORS = Counter(
    "isthmus_operator_reconcile_errors", "Reconciliations of a job that ended with an error.", registry=REGISTRY
)
ACTIONS = Counter("isthmus_operator_actions", "Actions carried out, by kind.", ["action"], registry=REGISTRY)
QUEUE_DEPTH = Gauge("isthmus_operator_queue_depth", "Jobs that wait for a worker.", registry=REGISTRY)
QUEUE_AGE = Gauge(
    "isthmus_operator_queue_age_seconds", "Longest time that a job has waited for a worker.",
    registry=REGISTRY,
)  # fmt: skip
WORKERS_BUSY = Gauge("isthmus_operator_workers_busy", "Workers that reconcile a job.", registry=REGISTRY)
BRIDGE_CALLS = Counter(
    "isthmus_operator_bridge_calls",
    "Calls to bridges, by their outcome.",
    ["site", "method", "code"],
    registry=REGISTRY,
)
BRIDGE_SECONDS = Histogram(
    "isthmus_operator_bridge_call_seconds", "Duration of calls to bridges.", ["site", "method"], registry=REGISTRY
)
CIRCUIT_OPEN = Gauge(
    "isthmus_operator_circuit_open",
    "1 while calls to a site are paused because it did not respond to several calls in a row.",
    ["site"],
    registry=REGISTRY,
)
SILENT_AGGREGATORS = Gauge(
    "isthmus_operator_silent_aggregators",
    "Running aggregators that did not respond to several calls in a row.",
    registry=REGISTRY,
)
OBSERVER_ERRORS = Counter(
    "isthmus_operator_observer_errors", "Calls to aggregators that failed.", ["code"], registry=REGISTRY
)
STATUS_WRITES = Counter("isthmus_operator_status_writes", "Writes of a FederatedJob's status.", registry=REGISTRY)
EVENTS = Counter("isthmus_operator_events", "Kubernetes events written.", ["reason"], registry=REGISTRY)
ADMISSION = Counter(
    "isthmus_operator_admission_reviews", "Manifests reviewed by the webhook.", ["verdict"], registry=REGISTRY
)
LOOP_LAG = Gauge("isthmus_operator_loop_lag_seconds", "Delay of the event loop.", registry=REGISTRY)
CLOCK_SKEW = Gauge(
    "isthmus_operator_clock_skew_seconds",
    "Time by which the clock of the operator's node is ahead of the API server's, which the operator follows.",
    registry=REGISTRY,
)
RESYNC_AGE = Gauge(
    "isthmus_operator_resync_age_seconds",
    "Time since the last complete list of all FederatedJobs and HPCSites.",
    registry=REGISTRY,
)
NAMESPACE_SERVED = Gauge(
    "isthmus_operator_namespace_served",
    "0 while the API server forbids the operator to list the FederatedJobs of a namespace that it serves.",
    ["namespace"],
    registry=REGISTRY,
)
SITE_CERTIFICATE_EXPIRY = Gauge(
    "isthmus_operator_site_certificate_expiry_timestamp_seconds",
    "Expiry of the certificate with which the operator calls a site.",
    ["site"],
    registry=REGISTRY,
)
GATEWAY_CONNECTED = Gauge(
    "isthmus_operator_gateway_connected", "1 while the bridge of a site that dials out is connected.", ["site"],
    registry=REGISTRY,
)  # fmt: skip
GATEWAY_TUNNELS = Counter(
    "isthmus_operator_gateway_tunnels", "Bridges that dialled the gateway: accepted, replaced, refused.", ["result"],
    registry=REGISTRY,
)  # fmt: skip
INFO = Gauge("isthmus_operator_info", "Always 1; the label is the version.", ["version"], registry=REGISTRY)
INFO.labels(__version__).set(1)

JobStatus = tuple[str, str, Mapping[str, Any]]  # namespace, name, status


class JobsCollector(Collector):
    """Collector of the jobs' statuses at each scrape, so that a deleted job leaves no series behind."""

    def __init__(
        self,
        jobs: Callable[[], Iterable[JobStatus]],
        sites: Callable[[], Mapping[str, bool]],
        kept: Callable[[], Mapping[str, int]],
    ) -> None:
        self._jobs = jobs
        self._sites = sites
        self._kept = kept

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Build the metric families for one scrape."""
        phases = GaugeMetricFamily("isthmus_operator_jobs", "FederatedJobs by phase.", labels=["phase"])
        clients = GaugeMetricFamily(
            "isthmus_operator_pool_clients",
            "Clients of a pool by state: desired, queued, ready, failed.",
            labels=["namespace", "job", "pool", "state"],
        )
        rounds = GaugeMetricFamily(
            "isthmus_operator_rounds_completed", "Rounds that a job completed.", labels=["namespace", "job"]
        )
        conditions = GaugeMetricFamily(
            "isthmus_operator_job_condition",
            "A condition of a job: 1 if it is True, else 0.",
            labels=["namespace", "job", "condition"],
        )
        counts: dict[str, int] = dict.fromkeys(get_args(Phase), 0)
        for namespace, name, status in self._jobs():
            phase = str(status.get("phase") or "Pending")
            counts[phase] = counts.get(phase, 0) + 1
            for pool in status.get("pools") or ():
                for state in ("desired", "queued", "ready", "failed"):
                    clients.add_metric([namespace, name, str(pool.get("name")), state], float(pool.get(state) or 0))
            for condition in status.get("conditions") or ():
                holds = float(condition.get("status") == "True")
                conditions.add_metric([namespace, name, str(condition.get("type"))], holds)
            rounds.add_metric([namespace, name], float((status.get("rounds") or {}).get("completed") or 0))
        for phase, count in sorted(counts.items()):
            phases.add_metric([phase], count)
        reachable = GaugeMetricFamily(
            "isthmus_operator_site_reachable", "1 if a site's bridge responds, else 0.", labels=["site"]
        )
        for site, value in sorted(self._sites().items()):
            reachable.add_metric([site], float(value))
        kept = GaugeMetricFamily(
            "isthmus_operator_kept", "Objects that the operator keeps in memory, by kind.", labels=["kind"]
        )
        for kind, number in self._kept().items():
            kept.add_metric([kind], number)
        return (phases, clients, conditions, rounds, reachable, kept)
