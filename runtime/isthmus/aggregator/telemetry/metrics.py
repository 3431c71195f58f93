"""The aggregator's Prometheus metrics: one series per job and pool, never one per client."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus_contracts.pb import federation_pb2 as pb

_ROUND_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
_STAGE_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_STALENESS_BUCKETS = (0, 1, 2, 3, 5, 8, 13, 21)


class AggregatorMetrics:
    """All metrics of one aggregator, labelled with its job."""

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
        self.rounds_planned = gauge("isthmus_rounds_planned", "Number of rounds in the job's manifest").labels(**bound)
        self.rounds_completed = gauge(
            "isthmus_rounds_completed", "Committed rounds, including those before a restart"
        ).labels(**bound)
        self.round_current = gauge(
            "isthmus_round_current", "Number of the round in progress; 0 if there is none"
        ).labels(**bound)
        self.round_seconds = histogram(
            "isthmus_round_seconds", "From the first offer to the commit", _ROUND_BUCKETS
        ).labels(**bound)
        self.stage_seconds = histogram(
            "isthmus_stage_seconds",
            "Time of one client, update or checkpoint in a stage: wait, pull, evaluate, train, encode (of each client"
            " since its last update, added at the round's end), push, fold; checkpoint (with an empty pool)",
            _STAGE_BUCKETS,
            "stage",
            "pool",
        )
        self.checkpoint_failures = counter(
            "isthmus_checkpoint_failures_total", "Failed writes of checkpoints and records, which are retried"
        ).labels(**bound)
        self.clients = gauge("isthmus_clients", "Clients by pool and state (ready, failed)", "pool", "state")
        self.selected = gauge("isthmus_round_clients_selected", "Clients selected for the round in progress").labels(
            **bound
        )
        self.submitted = gauge("isthmus_round_clients_submitted", "Updates that count in the round in progress").labels(
            **bound
        )
        self.clients_selected = counter(
            "isthmus_clients_selected_total", "Clients selected, over all finished rounds", "pool"
        )
        self.clients_finished = counter(
            "isthmus_clients_finished_total",
            "Clients of finished rounds by state: completed (submitted), late (still training), failed (lost, refused)",
            "pool",
            "state",
        )
        self.staleness = histogram(
            "isthmus_update_staleness_rounds",
            "Rounds by which the base model of a counted update was older than the newest",
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
            "isthmus_updates_refused_total", "Updates that were not accepted, by pool and reason", "pool", "reason"
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
            "isthmus_privacy_epsilon", "Epsilon spent by all published models, for the job's delta"
        )
        self.privacy_epsilon_limit = gauge("isthmus_privacy_epsilon_limit", "Privacy budget (maxEpsilon)")
        self.privacy_delta = gauge("isthmus_privacy_delta", "Delta of the privacy budget")
        self.privacy_clipped = gauge(
            "isthmus_privacy_clipped_ratio", "Share of the newest round's updates whose norm exceeded clipNorm"
        )
        self.privacy_clip_norm = gauge(
            "isthmus_privacy_clip_norm", "Norm that the next updates are clipped to: clipNorm, or what follows from it"
        )
        self.model_bytes = gauge("isthmus_model_bytes", "Size of the global model").labels(**bound)

    def show(self, status: pb.FederationStatus, round_number: int) -> None:
        """Set the gauges. ``round_number``: number of the round in progress; 0 if there is none."""
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
        """Set the gauges of differential privacy, whose series exist only for jobs that use it."""
        self.privacy_epsilon.labels(**self.bound).set(privacy.epsilon)
        self.privacy_delta.labels(**self.bound).set(privacy.delta)
        self.privacy_clipped.labels(**self.bound).set(privacy.clipped_ratio)
        self.privacy_clip_norm.labels(**self.bound).set(privacy.clip_norm)
        if privacy.max_epsilon:
            self.privacy_epsilon_limit.labels(**self.bound).set(privacy.max_epsilon)

    def accepted(self, pool: str, staleness: int) -> None:
        """Count an update whose base model is ``staleness`` rounds older than the newest."""
        self.staleness.labels(**self.bound, pool=pool).observe(staleness)

    def took_part(self, selected: Iterable[tuple[str, int]], finished: Mapping[str, Iterable[tuple[str, int]]]) -> None:
        """Count the clients (pool, index) of a finished round, in all and by their final state."""
        for pool, count in Tally(pool for pool, _ in selected).items():
            self.clients_selected.labels(**self.bound, pool=pool).inc(count)
        for state, clients in finished.items():
            for pool, count in Tally(pool for pool, _ in clients).items():
                self.clients_finished.labels(**self.bound, pool=pool, state=state).inc(count)
