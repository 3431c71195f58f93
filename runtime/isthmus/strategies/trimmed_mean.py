"""The mean of each coordinate without its extremes."""

import torch

from ..tensors import State
from .base import Setup, wide
from .robust import RobustRule


class TrimmedMean(RobustRule):
    """Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (2018), definition 2.

    Of n updates, each coordinate's floor(trim n) smallest and as many of its largest values are left out.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._trim = setup.parameters["trim"]

    def combine(self, rows: list[int]) -> State:
        cut = int(self._trim * len(rows))

        def mean(block: torch.Tensor) -> torch.Tensor:
            return block.sort(dim=0).values[cut : len(rows) - cut].mean(dim=0, dtype=wide(block.dtype))

        return self.blockwise(rows, mean)
