"""Metrics by round: what the clients measured, and the best of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus_contracts.federatedjob import Objective
from isthmus_contracts.pb import federation_pb2 as pb

from .checkpoints import RoundRecord
from .membership import ClientId


@dataclass
class WeightedMeans:
    """Means of named values over clients, weighted by examples. A client that reports twice counts once."""

    _reports: dict[ClientId, tuple[int, dict[str, float]]] = field(default_factory=dict)

    def add(self, client: ClientId, weight: int, values: Mapping[str, float]) -> None:
        """Takes one client's values; what is not finite is left out."""
        self._reports[client] = (weight, {name: value for name, value in values.items() if math.isfinite(value)})

    def means(self) -> dict[str, float]:
        """The weighted mean of each name over the clients that reported it."""
        sums: dict[str, list[float]] = {}
        for weight, values in self._reports.values():
            for name, value in values.items():
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0] += weight * value
                entry[1] += weight
        means = {name: total / weight for name, (total, weight) in sums.items() if weight}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}  # of huge values it may not be

    def clients(self) -> set[ClientId]:
        """Who has reported."""
        return set(self._reports)

    def __len__(self) -> int:
        return len(self._reports)


@dataclass
class Progress:
    """The newest value of each metric, and the best of the objective's."""

    objective: Objective
    newest: dict[str, pb.MetricValue] = field(default_factory=dict)
    best: pb.MetricValue = field(default_factory=pb.MetricValue)

    @property
    def reached(self) -> bool:
        """Whether the objective's target is reached, if it has one."""
        if self.objective.target is None or not self.best.name:
            return False
        target = float(self.objective.target)
        return self.best.value >= target if self.objective.goal == "Maximize" else self.best.value <= target

    def restore(self, records: list[RoundRecord]) -> None:
        """Takes up the records of earlier rounds."""
        for record in records:
            self.take(record.round, record.metrics)

    def take(self, round_number: int, means: Mapping[str, float]) -> None:
        """Takes the metrics of a round."""
        for name, value in means.items():
            metric = pb.MetricValue(name=name, value=value, round=round_number)
            self.newest[name] = metric
            if name == self.objective.metric and self._is_better(value):
                self.best = metric

    def _is_better(self, value: float) -> bool:
        if not self.best.name:
            return True
        return value > self.best.value if self.objective.goal == "Maximize" else value < self.best.value
