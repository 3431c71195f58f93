"""The mean of each coordinate without its extremes."""

from ..tensors import State
from .base import Setup
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
        return self.blockwise(rows, lambda block: block.sort(dim=0).values[cut : len(rows) - cut].mean(dim=0))
