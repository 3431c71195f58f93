"""Confirmation of a model's quality by more than half of the clients, regardless of the weights that they claim.

Clients report weights and values without proof. By the mean alone, a single client could end a job that has a target.
"""

import math
from collections.abc import Collection, Set

from isthmus_contracts.api.federated_job import Objective

from ..clients.membership import ClientId
from .metrics_by_round import WeightedMeans


def confirmed(mean: float, own: Collection[float], asked: int, objective: Objective) -> float | None:
    """Return the strictest target that a model meets; ``None`` while too few clients have measured it.

    A model meets a target if the ``mean`` does, and if the ``own`` values of more than half of the ``asked`` clients
    do.
    """
    maximize = objective.goal == "Maximize"
    finite = sorted((value for value in own if math.isfinite(value)), reverse=maximize)
    middle = max(asked, len(own)) // 2
    if len(finite) <= middle:
        return None
    return min(mean, finite[middle]) if maximize else max(mean, finite[middle])


class ClientMeasurements:
    """Newest value of the objective's metric of each client, for any model."""

    def __init__(self, objective: Objective, few: bool) -> None:
        """``few``: true if models of the job are measured by few clients, since the others are still training."""
        self._objective = objective
        self._few = few
        self._newest: dict[ClientId, float] = {}
        self._silent: set[ClientId] = set()

    def confirmed(
        self, means: WeightedMeans, names: Collection[str], mean: float | None, asked: Set[ClientId],
        present: Set[ClientId],
    ) -> float | None:  # fmt: skip
        """Return the lower bound of a model's metric that most clients confirm, or ``None``.

        ``means``: the clients' measurements, in which the metric has any of the ``names``. ``asked``: the clients that
        were asked to measure the model. ``present``: those that could be asked. If fewer than two were asked while more
        are present, all count with their newest measurement.
        """
        own = {client: value for name in names for client, value in means.of(name).items()}
        # These clients measure other metrics, or have no data.
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
