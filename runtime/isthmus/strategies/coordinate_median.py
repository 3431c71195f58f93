"""The median of each coordinate."""

import torch

from ..tensors import State
from .robust import RobustRule


class CoordinateMedian(RobustRule):
    """Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (2018), definition 1.

    Of an even number of updates, the mean of the middle two.
    """

    def combine(self, rows: list[int]) -> State:
        def median(block: torch.Tensor) -> torch.Tensor:
            ordered, middle = block.sort(dim=0).values, (len(rows) - 1) // 2
            return ordered[middle].clone() if len(rows) % 2 else ordered[middle : middle + 2].mean(dim=0)

        return self.blockwise(rows, median)
