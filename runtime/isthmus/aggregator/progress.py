"""Metrics by round: what the clients measured, and the best of it."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus_contracts.federatedjob import Objective
from isthmus_contracts.pb import federation_pb2 as pb

from ..metricnames import MOST_METRICS
from .checkpoints import RoundRecord
from .membership import ClientId

log = logging.getLogger(__name__)

MOST_NAMES = 4 * MOST_METRICS
"""Of metrics, in a job's life."""


@dataclass
class WeightedMeans:
    """Means of named values over clients, weighted by examples. A client that reports twice counts once."""

    _reports: dict[ClientId, tuple[int, dict[str, float]]] = field(default_factory=dict)

    def add(self, client: ClientId, weight: int, values: Mapping[str, float]) -> None:
        """Takes one client's values; what is not finite is left out."""
        self._reports[client] = (weight, {name: value for name, value in values.items() if math.isfinite(value)})

    def means(self) -> dict[str, float]:
        """Return the weighted mean of each name over the clients that reported it.

        Names that most clients report come first, so that the names of one client alone are the first to be left out.
        """
        sums: dict[str, list[float]] = {}
        voices: Counter[str] = Counter()
        for weight, values in self._reports.values():
            voices.update(values.keys())
            for name, value in values.items():
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0] += weight * value
                entry[1] += weight
        ordered = sorted(sums, key=lambda name: -voices[name])
        means = {name: sums[name][0] / sums[name][1] for name in ordered if sums[name][1]}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}  # of huge values it may not be

    def clients(self) -> set[ClientId]:
        """Return who has reported."""
        return set(self._reports)


@dataclass
class Progress:
    """The newest value of each metric, and the best of the objective's."""

    objective: Objective
    newest: dict[str, pb.MetricValue] = field(default_factory=dict)
    best: pb.MetricValue = field(default_factory=pb.MetricValue)
    _earlier: pb.MetricValue = field(default_factory=pb.MetricValue)  # the best before the newest round
    _full: bool = False

    def admit(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return those metrics that are kept: of the names that a job ever reports, the first :data:`MOST_NAMES`, and
        the objective's. Each costs memory, a series and a line of the status until the job ends."""
        known = {name: value for name, value in means.items() if name in self.newest or name == self.objective.metric}
        fresh = [name for name in means if name not in known]
        room = max(MOST_NAMES - len(self.newest), 0)
        if len(fresh) > room and not self._full:
            self._full = True
            log.warning("more than %d names of metrics: those that come now are left out", MOST_NAMES)
        return {**known, **{name: means[name] for name in fresh[:room]}}

    @property
    def reached(self) -> bool:
        """True if the objective's target is reached, if it has one."""
        if self.objective.target is None or not self.best.name:
            return False
        target = float(self.objective.target)
        return self.best.value >= target if self.objective.goal == "Maximize" else self.best.value <= target

    def restore(self, records: list[RoundRecord]) -> None:
        """Takes up the records of earlier rounds."""
        for record in records:
            self.take(record.round, record.metrics)

    def take(self, round_number: int, means: Mapping[str, float]) -> None:
        """Take the metrics of a round. They replace those that were taken of it when fewer clients had reported."""
        for name, value in means.items():
            metric = pb.MetricValue(name=name, value=value, round=round_number)
            if name == self.objective.metric:
                if name not in self.newest or self.newest[name].round != round_number:
                    self._earlier = self.best
                self.best = metric if self._improves(value) else self._earlier
            self.newest[name] = metric

    def _improves(self, value: float) -> bool:
        if not self._earlier.name:
            return True
        return value > self._earlier.value if self.objective.goal == "Maximize" else value < self._earlier.value
