"""The aggregator's Prometheus metrics: one series per job and pool, never one per client."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus_contracts.pb import federation_pb2 as pb

_ROUND_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
_STAGE_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_STALENESS_BUCKETS = (0, 1, 2, 3, 5, 8, 13, 21)


class AggregatorMetrics:
    """Registers every metric of one aggregator, bound to its job."""

    def __init__(self, namespace: str, job: str) -> None:
        self.registry = CollectorRegistry()
        bound = {"namespace": namespace, "job": job}
        names = list(bound)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, [*names, *labels], registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, [*names, *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, [*names, *labels], registry=self.registry, buckets=buckets)

        self.bound = bound
        self.rounds_planned = gauge("isthmus_rounds_planned", "Rounds that the job asks for").labels(**bound)
        self.rounds_completed = gauge("isthmus_rounds_completed", "Rounds committed, also before a restart").labels(
            **bound
        )
        self.round_current = gauge("isthmus_round_current", "Number of the round in progress; 0: none").labels(**bound)
        self.round_seconds = histogram(
            "isthmus_round_seconds", "From the first offer to the commit", _ROUND_BUCKETS
        ).labels(**bound)
        self.stage_seconds = histogram(
            "isthmus_stage_seconds",
            "Time of one client, update or checkpoint in a stage: wait, pull, evaluate, train, encode (of each client"
            " since its last update, booked at the round's end), push, fold; checkpoint (its pool is empty)",
            _STAGE_BUCKETS,
            "stage",
            "pool",
        )
        self.checkpoint_failures = counter(
            "isthmus_checkpoint_failures_total", "Checkpoints that could not be written, and were tried again"
        ).labels(**bound)
        self.clients = gauge("isthmus_clients", "Clients by pool and state (ready, failed)", "pool", "state")
        self.selected = gauge("isthmus_round_clients_selected", "Clients in the round in progress").labels(**bound)
        self.submitted = gauge("isthmus_round_clients_submitted", "Of which have handed in").labels(**bound)
        self.clients_selected = counter("isthmus_clients_selected_total", "Clients of all rounds that are over", "pool")
        self.clients_finished = counter(
            "isthmus_clients_finished_total",
            "The same by state: completed (handed in), late (still at it at the end), failed (gone, or refused)",
            "pool",
            "state",
        )
        self.staleness = histogram(
            "isthmus_update_staleness_rounds",
            "How many rounds the base model of a counted update was behind the newest",
            _STALENESS_BUCKETS,
            "pool",
        )
        self.updates = counter(
            "isthmus_updates_total",
            "Updates by pool and result (accepted, repeated, stale, closed, fenced, invalid, corrupt, unconnected)",
            "pool",
            "result",
        )
        self.refused = counter(
            "isthmus_updates_refused_total", "Updates that were not taken, by pool and reason", "pool", "reason"
        )
        self.received_bytes = counter(
            "isthmus_received_bytes_total", "Tensor bytes received from clients, as encoded by codec", "pool", "codec"
        )
        self.sent_bytes = counter(
            "isthmus_sent_bytes_total", "Tensor bytes sent to clients, as encoded by codec", "pool", "codec"
        )
        self.metric = gauge("isthmus_metric", "Newest value of a training or evaluation metric", "metric")
        self.best_metric = gauge("isthmus_best_metric", "Best value of the objective's metric", "metric")
        self.privacy_epsilon = gauge(
            "isthmus_privacy_epsilon", "Epsilon of all models that were published, for the job's delta"
        )
        self.privacy_epsilon_limit = gauge("isthmus_privacy_epsilon_limit", "The privacy budget: maxEpsilon")
        self.privacy_delta = gauge("isthmus_privacy_delta", "The delta that epsilon goes with")
        self.privacy_clipped = gauge(
            "isthmus_privacy_clipped_ratio", "Share of the newest round's updates that were longer than clipNorm"
        )
        self.model_bytes = gauge("isthmus_model_bytes", "Size of the global model").labels(**bound)

    def show(self, status: pb.FederationStatus, round_number: int) -> None:
        """Sets the gauges. ``round_number``: of the round in progress; 0: none."""
        self.rounds_completed.set(status.completed_rounds)
        self.round_current.set(round_number)
        self.selected.set(status.selected)
        self.submitted.set(status.submitted)
        for pool in status.pools:
            self.clients.labels(**self.bound, pool=pool.name, state="ready").set(pool.connected)
            self.clients.labels(**self.bound, pool=pool.name, state="failed").set(pool.failed)
        for metric in status.metrics:
            self.metric.labels(**self.bound, metric=metric.name).set(metric.value)
        if status.best.name:
            self.best_metric.labels(**self.bound, metric=status.best.name).set(status.best.value)

        if status.HasField("privacy"):
            self._show_privacy(status.privacy)

    def _show_privacy(self, privacy: pb.PrivacyStatus) -> None:
        """A job without differential privacy has none of these series."""
        self.privacy_epsilon.labels(**self.bound).set(privacy.epsilon)
        self.privacy_delta.labels(**self.bound).set(privacy.delta)
        self.privacy_clipped.labels(**self.bound).set(privacy.clipped_ratio)
        if privacy.max_epsilon:
            self.privacy_epsilon_limit.labels(**self.bound).set(privacy.max_epsilon)

    def accepted(self, pool: str, staleness: int) -> None:
        """An update counts that was trained from a model so many rounds older than the newest."""
        self.staleness.labels(**self.bound, pool=pool).observe(staleness)

    def took_part(self, selected: Iterable[tuple[str, int]], finished: Mapping[str, Iterable[tuple[str, int]]]) -> None:
        """The clients (pool, index) of a round that is over, and the same by their state."""
        for pool, count in Tally(pool for pool, _ in selected).items():
            self.clients_selected.labels(**self.bound, pool=pool).inc(count)
        for state, clients in finished.items():
            for pool, count in Tally(pool for pool, _ in clients).items():
                self.clients_finished.labels(**self.bound, pool=pool, state=state).inc(count)
