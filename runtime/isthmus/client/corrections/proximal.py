"""Client side of FedProx: the gradient of the proximal term is added before every optimizer step."""

from collections.abc import Iterator

import torch

from ..state.parameter_names import ParameterNames
from .base import GradientCorrection
from .optimizers import parameters_of


class ProximalTerm(GradientCorrection):
    """Term mu * (w - w_global) of the gradients: the gradient of (mu / 2) * ||w - w_global||^2.

    Li et al., "Federated Optimization in Heterogeneous Networks" (2020), algorithm 2. Parameters that are not
    sent have no global value, and are not corrected.
    """

    name = "FedProx"

    def __init__(self, mu: float, names: ParameterNames) -> None:
        super().__init__(names)
        self._mu = mu
        self._anchors: dict[int, torch.Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the parameters' present values as the global ones, and hook into ``optimizer.step``."""
        super().attach(optimizer)
        shared = [each for each in parameters_of(optimizer) if not self._names.leave_out(each)]
        for parameter in shared:
            if id(parameter) not in self._anchors:
                self._anchors[id(parameter)] = parameter.detach().clone()
        self._terms.hook(optimizer, shared)

    def close(self) -> None:
        super().close()
        self._anchors.clear()

    def _terms_of(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        if (anchor := self._anchors.get(id(parameter))) is not None:
            yield (parameter - anchor).mul_(self._mu)
