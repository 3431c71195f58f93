"""GeometricMedian: the point with the least sum of distances to all updates."""

from functools import partial

import torch

from ...tensors import State
from ..base import Setup
from .base import RobustRule, mean

_ITERATIONS = 1000
# The iterations have converged when one moves the point by less than this, relative to the spread of most updates.
_SETTLED = 1e-9
# Maximum distance of an update, relative to the same spread; updates further away are moved to it.
_FAR = 1e6


class GeometricMedian(RobustRule):
    """Smoothed Weiszfeld iterations with weights of 1 / max(smoothing, distance from the present point).

    Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (2022), algorithm 2. The point is a mean
    of the updates with some weights, and its distances follow from these weights and the updates' inner products; so
    the iterations, which run until they converge, need not read the updates again.

    The origin is the update whose nearer half of the others is nearest, and their distance is the unit for all
    thresholds, so that outliers do not set the scale. An update's pull depends on its direction only, so an update more
    than a million units away is moved to that distance: further out, its square would cost the others' distances their
    precision.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._smoothing = setup.parameters["smoothing"]

    def combine(self, rows: list[int]) -> State:
        between = self.squared_distances(rows)
        # Squared distance within which more than half of the updates lie, including the update itself.
        reach = between.sort(dim=1).values[:, len(rows) // 2]
        origin = int(reach.argmin())
        unit = max(float(reach[origin].sqrt()), self._smoothing)
        nearer = (_FAR * unit / between[origin].sqrt()).clamp_(max=1.0)
        products = self.products(rows, origin) * nearer * nearer[:, None]
        weights = self._weights(products, (between[origin] <= reach[origin]).double(), unit)
        return self.joined(rows, partial(mean, shares=weights * nearer, origin=origin), rows)

    def _weights(self, products: torch.Tensor, start: torch.Tensor, unit: float) -> torch.Tensor:
        """Return the updates' weights, which sum to 1, in their geometric median. ``start``: initial weights."""
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
