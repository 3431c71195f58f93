"""The point with the least sum of distances to all updates."""

import torch

from ..tensors import State
from .base import Setup
from .robust import RobustRule

_ITERATIONS = 1000
_SETTLED = 1e-10


class GeometricMedian(RobustRule):
    """Smoothed Weiszfeld iterations: weights of 1 / max(smoothing, distance from the present point), and again.

    Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (2022), algorithm 2. The point is a mean
    of the updates with some weights, and its distances follow from these weights and the distances between the updates;
    so the iterations, done until they settle, need not read the updates again.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._smoothing = setup.parameters["smoothing"]

    def combine(self, rows: list[int]) -> State:
        between = self.squared_distances(rows)
        weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64, device="cpu")
        for _ in range(_ITERATIONS):
            # |sum_j w_j y_j - y_k|^2 = sum_j w_j |y_j - y_k|^2 - 1/2 sum_ij w_i w_j |y_i - y_j|^2, for weights of sum 1
            towards = between @ weights
            distances = (towards - 0.5 * (weights @ towards)).clamp_(min=0).sqrt_()
            pulls = 1 / distances.clamp_(min=self._smoothing)
            previous, weights = weights, pulls / pulls.sum()
            if (weights - previous).abs().max() < _SETTLED:
                break
        return self.mean(rows, weights)
