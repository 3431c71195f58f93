"""The update that its neighbours agree with, or the mean of some such."""

import logging

from ...tensors import State
from ..base import Setup
from .base import RobustRule, mean

log = logging.getLogger(__name__)


class Krum(RobustRule):
    """Takes the one update whose n - byzantine - 2 nearest others are nearest, by the sum of squared distances.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (2017), section 4. The
    guarantee holds for n of at least 2 byzantine + 3. It is of the trained weights; of statistics and counters the
    median of all updates is taken.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._byzantine = int(setup.parameters["byzantine"])

    def combine(self, rows: list[int]) -> State:
        return self.joined(self._best(rows)[:1], mean, rows)

    def _best(self, rows: list[int]) -> list[int]:
        """The rows, those with the lowest scores first."""
        count = len(rows)
        if count < 2 * self._byzantine + 3:
            log.warning("%d updates are too few to withstand %d wrong ones", count, self._byzantine)
        neighbours = max(count - self._byzantine - 2, 1)
        # The nearest of all is the update itself, at distance 0.
        scores = self.squared_distances(rows).sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
        return [rows[index] for index in scores.argsort(stable=True).tolist()]


class MultiKrum(Krum):
    """The mean of the ``keep`` updates that Krum likes best; 0 keeps all but ``byzantine`` of them."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._keep = int(setup.parameters["keep"])

    def combine(self, rows: list[int]) -> State:
        keep = self._keep or len(rows) - self._byzantine
        return self.joined(self._best(rows)[: max(keep, 1)], mean, rows)
