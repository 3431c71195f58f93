"""CoordinateMedian: the median of each coordinate."""

from ...tensors import State
from .base import RobustRule, median


class CoordinateMedian(RobustRule):
    """Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (2018), definition 1.

    For an even number of updates, the mean of the middle two.
    """

    def combine(self, rows: list[int]) -> State:
        return self.blockwise(rows, median)
