"""FedAvgM: FedAvg with momentum on the server."""

import torch

from ..base import Setup
from .base import ServerOptimizer


class FedAvgM(ServerOptimizer):
    """Momentum v = momentum v + gradient; learningRate v is subtracted from the model.

    Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
    (2019), section 4.3.
    """

    slots = ("v",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._momentum = setup.parameters["momentum"]

    def step(self, gradient: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        (v,) = memory
        v.mul_(self._momentum).add_(gradient)
        return torch.mul(v, self._rate, out=gradient)
