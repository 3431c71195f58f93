"""Prometheus metrics of secure aggregation. Their series exist only for jobs that use it."""

from prometheus_client import Counter, Gauge, Histogram

from isthmus_contracts.pb import federation_pb2 as pb

from .metrics import AggregatorMetrics

_PHASE_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
OUTCOMES = ("opened", "failed", "replaced")
"""Ends of an instance: its sum was opened; it cannot be opened; another began before its survivors were fixed."""


class SecureMetrics:
    """Metrics of one job's secure aggregation."""

    def __init__(self, metrics: AggregatorMetrics) -> None:
        self._bound, registry = metrics.bound, metrics.registry
        names = list(self._bound)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, names, registry=registry).labels(**self._bound)

        self._survivors = gauge("isthmus_secure_survivors", "Clients whose updates are in the newest opened sum")
        self._dropouts = gauge("isthmus_secure_dropouts", "Clients of the same instance whose updates are not")
        self._clipped = gauge(
            "isthmus_secure_clipped_ratio", "Share of the newest sum's coordinates that the layout's bounds cut"
        )
        self._phases = Histogram(
            "isthmus_secure_phase_seconds",
            "Time of a phase of an instance: advertise, reveal, shares, collect (the training), consent, unmask, open"
            " (the removal of the masks)",
            [*names, "phase"],
            registry=registry,
            buckets=_PHASE_BUCKETS,
        )
        self._instances = Counter(
            "isthmus_secure_instances_total",
            "Instances by outcome: opened, failed, replaced (before their survivors were fixed)",
            [*names, "outcome"],
            registry=registry,
        )
        self._faults = Counter(
            "isthmus_secure_faults_total", "Clients that were dropped from an instance, by reason", [*names, "reason"],
            registry=registry,
        )  # fmt: skip
        for outcome in OUTCOMES:
            self._instances.labels(**self._bound, outcome=outcome)

    def phase(self, name: str, seconds: float) -> None:
        """Record the duration of a phase."""
        self._phases.labels(**self._bound, phase=name).observe(seconds)

    def ended(self, outcome: str) -> None:
        """Count an instance with one of the :data:`OUTCOMES`."""
        self._instances.labels(**self._bound, outcome=outcome).inc()

    def fault(self, reason: str) -> None:
        """Count a client that was dropped."""
        self._faults.labels(**self._bound, reason=reason).inc()

    def opened(self, status: pb.SecureStatus) -> None:
        """Show the newest opened sum."""
        self._survivors.set(status.survivors)
        self._dropouts.set(status.dropouts)
        self._clipped.set(status.clipped_ratio)
