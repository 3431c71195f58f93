"""FedAdam: Adam on the server."""

import torch

from ..base import Setup
from .base import AdaptiveOptimizer


class FedAdam(AdaptiveOptimizer):
    """Second moment v = beta2 v + (1 - beta2) change squared.

    Reddi et al., "Adaptive Federated Optimization" (2021), algorithm 2.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._beta2 = setup.parameters["beta2"]

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> None:
        v.mul_(self._beta2).add_(square, alpha=1 - self._beta2)
