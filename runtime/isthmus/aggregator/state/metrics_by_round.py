"""Metrics of each round, as measured by clients, with the best value and the objective's target."""

import difflib
import logging
import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from isthmus_contracts.api.federated_job import Objective
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ...metric_names import MAX_METRICS
from ..clients.membership import ClientId
from ..storage.round_record import RoundRecord

log = logging.getLogger(__name__)

MOST_NAMES = 4 * MAX_METRICS
"""Bound of the number of metric names in a job's life."""
_SHOWN_NAMES, _SHOWN_CHARACTERS = 12, 64


@dataclass
class WeightedMeans:
    """Means of named values over clients, weighted by examples. Of a client's reports, the newest counts.

    ``robust``: unweighted medians instead, which no minority can move beyond the values of the others.
    """

    robust: bool = False
    _reports: dict[ClientId, tuple[float, dict[str, float]]] = field(default_factory=dict)

    def add(self, client: ClientId, weight: float, values: Mapping[str, float]) -> None:
        """Add one client's values. Values with weight 0 and values that are not finite are left out of the means."""
        self._reports[client] = (weight, dict(values))

    def means(self) -> dict[str, float]:
        """Return the mean of each name over the clients that reported it.

        Names that most clients report come first, so that names reported by a single client are dropped first.
        """
        reports: dict[str, list[tuple[float, float]]] = {}
        for weight, values in self._reports.values():
            for name, value in values.items():
                if weight and math.isfinite(value):
                    reports.setdefault(name, []).append((weight, value))
        ordered = sorted(reports, key=lambda name: -len(reports[name]))
        means = {name: self._mean(reports[name]) for name in ordered}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}  # huge values may overflow

    def _mean(self, entries: list[tuple[float, float]]) -> float:
        if self.robust:
            return statistics.median(value for _, value in entries)
        total = sum(weight for weight, _ in entries)
        return sum(weight * value for weight, value in entries) / total

    def of(self, name: str) -> dict[ClientId, float]:
        """Return each client's own value of a metric. Values that are not finite are included."""
        return {client: values[name] for client, (weight, values) in self._reports.items() if weight and name in values}

    def clients(self) -> set[ClientId]:
        """Return the clients that have reported."""
        return set(self._reports)

    def __len__(self) -> int:
        return len(self._reports)


@dataclass
class Progress:
    """Newest value of each metric, best value of the objective's, and the model that met its target."""

    objective: Objective
    newest: dict[str, pb.MetricValue] = field(default_factory=dict)
    best: pb.MetricValue = field(default_factory=pb.MetricValue)
    """Best value among models that most of the clients asked have measured, and whose checkpoint exists."""
    reached: int | None = None
    """Round whose model meets the target, if there is one."""
    note: str = ""
    """Problem of the objective, in one line; empty if there is none."""
    _settled: pb.MetricValue = field(
        default_factory=pb.MetricValue
    )  # best of all rounds before the newest measured one
    _measured: int = -1
    _full: bool = False

    def restore(
        self, records: Iterable[RoundRecord], available: Collection[int], best: tuple[int, float] | None = None
    ) -> None:
        """Restore the metrics from the records of earlier rounds.

        ``available``: the rounds whose models exist. ``best``: round and value of the best model, as committed with the
        newest one; after a power failure the records may be incomplete.
        """
        if best is not None and best[0] in available:
            self._settled = pb.MetricValue(name=self.objective.metric, round=best[0], value=best[1])
            self.best, self._measured = self._settled, 0
        for record in records:
            confirmation = record.confirmed.get(self.objective.metric) if record.round in available else None
            self.take(record.round, record.metrics, confirmation)
        self.note = ""

    def take(self, round_number: int, means: Mapping[str, float], confirmation: float | None = None) -> None:
        """Add the metrics of a round's model, and the confirmed bound of the objective's (:mod:`.confirmation`)."""
        for name, value in means.items():
            self.newest[name] = pb.MetricValue(name=name, value=value, round=round_number)
        if self.objective.metric not in means:
            return
        if round_number != self._measured:
            self._settled, self._measured = self.best, round_number
        self.best = self._settled
        value = means[self.objective.metric]
        if confirmation is not None and self._is_better(value):
            self.best = self.newest[self.objective.metric]
        if self._meets(confirmation):
            self.reached = round_number
        elif self.reached == round_number:
            self.reached = None
        self.note = ""
        if self._meets(value) and self.reached != round_number:
            self.note = (
                f"{self.objective.metric} is {value:.4g} after round {round_number}, which meets objective.target"
                f" {self.objective.target}; but not more than half of the clients asked measure as much, so it does not"
                " count as met"
            )

    def admit(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics to keep: the first :data:`MOST_NAMES` names of the job's life, and the objective's metric.

        Each name takes memory, a Prometheus series and a line of the status until the job ends.
        """
        known = {name: value for name, value in means.items() if name in self.newest or name == self.objective.metric}
        fresh = [name for name in means if name not in known]
        room = max(MOST_NAMES - len(self.newest), 0)
        if len(fresh) > room and not self._full:
            self._full = True
            log.warning("more than %d names of metrics: further ones are left out", MOST_NAMES)
        return {**known, **{name: means[name] for name in fresh[:room]}}

    def look_for_objective(self) -> None:
        """Set the note if models have been measured, but not by the objective's metric."""
        metric = self.objective.metric
        asked_for = self.objective.target is not None or metric != Objective().metric
        if not asked_for or metric in self.newest:
            return
        names = sorted(self.newest)
        found = ", ".join(one_line(name, _SHOWN_CHARACTERS) for name in names[:_SHOWN_NAMES]) + (
            ", ..." if len(names) > _SHOWN_NAMES else ""
        )
        close = difflib.get_close_matches(metric, names, 1)
        hint = f"; did you mean {one_line(close[0], _SHOWN_CHARACTERS)}?" if close else ""
        never = "; objective.target is never met" if self.objective.target is not None else ""
        self.note = f"objective.metric: no client reports {metric!r}; reported: {found or 'nothing'}{hint}{never}"

    def _meets(self, value: float | None) -> bool:
        if self.objective.target is None or value is None:
            return False
        target = float(self.objective.target)
        return value >= target if self.objective.goal == "Maximize" else value <= target

    def _is_better(self, value: float) -> bool:
        if not self.best.name:
            return True
        return value > self.best.value if self.objective.goal == "Maximize" else value < self.best.value
