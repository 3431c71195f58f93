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
            if len(rows) % 2:
                return ordered[middle].clone()
            both = ordered[middle : middle + 2]
            return both.mean(dim=0) if block.dtype.is_floating_point else _midpoint(*both)

        return self.blockwise(rows, median)


def _midpoint(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of integers, a half rounded to the even number; by way of no sum, which need not fit."""
    floor = (one & other) + ((one ^ other) >> 1)
    return floor + ((one ^ other) & floor & 1)
