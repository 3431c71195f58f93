"""FedAdagrad: Adagrad on the server."""

import torch

from .base import AdaptiveOptimizer


class FedAdagrad(AdaptiveOptimizer):
    """Second moment v = v + change squared. Reddi et al., "Adaptive Federated Optimization" (2021), algorithm 2.

    The paper uses beta1 = 0, which is the default.
    """

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> None:
        v.add_(square)
