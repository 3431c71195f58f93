"""How good a model is at least, as more than half of the clients have it: one voice each, whatever weight they claim.

Weights and values are the clients' own word. By the mean alone, a single client could end a job that has a target.
"""

import math
from collections.abc import Collection, Set

from isthmus_contracts.api.federated_job import Objective

from ..clients.membership import ClientId
from .metrics_by_round import WeightedMeans


def confirmed(mean: float, own: Collection[float], asked: int, objective: Objective) -> float | None:
    """Return the strictest target that a model meets; ``None`` while too few have measured it.

    It meets a target if the metric does and if more than half of the ``asked`` clients measure as much themselves
    (``own``).
    """
    maximize = objective.goal == "Maximize"
    finite = sorted((value for value in own if math.isfinite(value)), reverse=maximize)
    middle = max(asked, len(own)) // 2
    if len(finite) <= middle:
        return None
    return min(mean, finite[middle]) if maximize else max(mean, finite[middle])


class ClientMeasurements:
    """Each client's newest value of the objective's metric, of whatever model."""

    def __init__(self, objective: Objective, few: bool) -> None:
        """``few``: by its manifest the job has models that few clients measure, since the others are still at work."""
        self._objective = objective
        self._few = few
        self._newest: dict[ClientId, float] = {}
        self._silent: set[ClientId] = set()

    def confirmed(
        self, means: WeightedMeans, names: Collection[str], mean: float | None, asked: Set[ClientId],
        present: Set[ClientId],
    ) -> float | None:  # fmt: skip
        """Return how good a model is at least by ``means``, in which the metric goes by any of the ``names``.

        ``asked``: who was asked to measure it; ``present``: all that could be. Where fewer than two were asked while
        more are present, all take part with what they measured last.
        """
        own = {client: value for name in names for client, value in means.of(name).items()}
        # Those measure other things, or have no data to measure on.
        self._silent = (self._silent | means.clients()) - set(own)
        self._newest |= own
        for client in self._silent:
            self._newest.pop(client, None)
        if mean is None:
            return None
        asked = (asked | set(own)) - self._silent
        if self._few or len(asked) < 2:
            asked |= present - self._silent
            own = {client: value for client, value in self._newest.items() if client in asked}
        return confirmed(mean, own.values(), len(asked), self._objective)
