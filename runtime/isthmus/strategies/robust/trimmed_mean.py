"""TrimmedMean: the mean of each coordinate without its extremes."""

import math

import torch

from isthmus_contracts.api.fields import exactly

from ...tensors import State
from ..base import Setup
from .base import RobustRule, mean


class TrimmedMean(RobustRule):
    """Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (2018), definition 2.

    Of n updates, each coordinate's floor(trim n) smallest and floor(trim n) largest values are left out.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._trim = exactly(setup.parameters["trim"])

    def combine(self, rows: list[int]) -> State:
        cut = math.floor(self._trim * len(rows))

        def trimmed(block: torch.Tensor) -> torch.Tensor:
            kept = block.sort(dim=0).values[cut : len(rows) - cut]
            return mean(kept) if block.dtype.is_floating_point else kept.mean(dim=0, dtype=torch.float64)

        return self.blockwise(rows, trimmed)
