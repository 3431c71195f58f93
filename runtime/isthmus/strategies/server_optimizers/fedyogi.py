"""FedYogi: Yogi on the server."""

import torch

from ..base import Setup
from .base import AdaptiveOptimizer


class FedYogi(AdaptiveOptimizer):
    """Second moment v = v - (1 - beta2) change squared * sign(v - change squared), which changes v only gradually.

    Reddi et al., "Adaptive Federated Optimization" (2021), algorithm 2.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._beta2 = setup.parameters["beta2"]

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> None:
        v.addcmul_(square, torch.sign(v - square), value=-(1 - self._beta2))
