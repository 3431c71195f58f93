"""Krum and MultiKrum: the update closest to its neighbours, or the mean of the closest ones."""

import logging

from ...tensors import State
from ..base import Setup
from .base import RobustRule, mean

log = logging.getLogger(__name__)


class Krum(RobustRule):
    """Selection of the update with the least sum of squared distances to its n - byzantine - 2 nearest neighbours.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (2017), section 4. The
    guarantee holds for n of at least 2 byzantine + 3, and for the trained weights. For statistics and counters the
    result is the median of all updates.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._byzantine = int(setup.parameters["byzantine"])

    def combine(self, rows: list[int]) -> State:
        return self.joined(self._best(rows)[:1], mean, rows)

    def _best(self, rows: list[int]) -> list[int]:
        """Return the rows by ascending score."""
        count = len(rows)
        if count < 2 * self._byzantine + 3:
            log.warning("%d updates are too few to withstand %d wrong ones", count, self._byzantine)
        neighbours = max(count - self._byzantine - 2, 1)
        # The nearest neighbour is the update itself, at distance 0.
        scores = self.squared_distances(rows).sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
        return [rows[index] for index in scores.argsort(stable=True).tolist()]


class MultiKrum(Krum):
    """Mean of the ``keep`` updates with the lowest scores; 0 keeps all but ``byzantine`` of them."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._keep = int(setup.parameters["keep"])

    def combine(self, rows: list[int]) -> State:
        keep = self._keep or len(rows) - self._byzantine
        return self.joined(self._best(rows)[: max(keep, 1)], mean, rows)
