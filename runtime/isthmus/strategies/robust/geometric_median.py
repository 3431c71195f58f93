"""The point with the least sum of distances to all updates."""

from functools import partial

import torch

from ...tensors import State
from ..base import Setup
from .base import RobustRule, mean

_ITERATIONS = 1000
# The point has come to rest when an iteration moves it by less, as a part of the spread of most updates.
_SETTLED = 1e-9
# How far an update may be, in the same measure, before it is brought nearer.
_FAR = 1e6


class GeometricMedian(RobustRule):
    """Smoothed Weiszfeld iterations: weights of 1 / max(smoothing, distance from the present point), and again.

    Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (2022), algorithm 2. The point is a mean
    of the updates with some weights, and its distances follow from these weights and the updates' inner products; so
    the iterations, done until they settle, need not read the updates again.

    The origin is the update that has most of the others nearest, and how near is the unit of all that is to be small or
    large: the scale of no outlier enters. An update pulls by its direction alone, so one that is beyond a million of
    these units is brought to there: further out its square would take the digits of everybody else's distances.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._smoothing = setup.parameters["smoothing"]

    def combine(self, rows: list[int]) -> State:
        between = self.squared_distances(rows)
        reach = between.sort(dim=1).values[:, len(rows) // 2]  # of more than half of the updates, itself among them
        origin = int(reach.argmin())
        unit = max(float(reach[origin].sqrt()), self._smoothing)
        nearer = (_FAR * unit / between[origin].sqrt()).clamp_(max=1.0)
        products = self.products(rows, origin) * nearer * nearer[:, None]
        weights = self._weights(products, (between[origin] <= reach[origin]).double(), unit)
        return self.joined(rows, partial(mean, shares=weights * nearer, origin=origin), rows)

    def _weights(self, products: torch.Tensor, start: torch.Tensor, unit: float) -> torch.Tensor:
        """The updates' weights, which sum to 1, in their geometric median. ``start``: weights to begin with."""
        weights = start / start.sum()
        squares = products.diagonal()
        for _ in range(_ITERATIONS):
            # |sum_j w_j y_j - y_k|^2 = |y_k|^2 - 2 sum_j w_j y_j y_k + sum_ij w_i w_j y_i y_j
            towards = products @ weights
            distances = (squares - 2 * towards + weights @ towards).clamp_(min=0).sqrt_()
            pulls = 1 / distances.clamp_(min=self._smoothing)
            previous, weights = weights, pulls / pulls.sum()
            moved = weights - previous
            if float(moved @ products @ moved) <= (_SETTLED * unit) ** 2:
                break
        return weights
