"""FedProx on the client's side: the proximal term's gradient, added before every optimizer step."""

from collections.abc import Iterator

import torch

from ..state.parameter_names import Names
from .base import GradientCorrection
from .optimizers import parameters_of


class ProximalTerm(GradientCorrection):
    """Adds mu * (w - w_global) to the gradients: the gradient of (mu / 2) * ||w - w_global||^2.

    Li et al., "Federated Optimization in Heterogeneous Networks" (2020), algorithm 2. Parameters that do not travel
    have no global value, and are left alone.
    """

    name = "FedProx"

    def __init__(self, mu: float, names: Names) -> None:
        super().__init__(names)
        self._mu = mu
        self._anchors: dict[int, torch.Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the parameters' present values as the global ones, and hooks into ``optimizer.step``."""
        super().attach(optimizer)
        travelling = [each for each in parameters_of(optimizer) if not self._names.leave_out(each)]
        for parameter in travelling:
            if id(parameter) not in self._anchors:
                self._anchors[id(parameter)] = parameter.detach().clone()
        self._terms.hook(optimizer, travelling)

    def close(self) -> None:
        super().close()
        self._anchors.clear()

    def _terms_of(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        if (anchor := self._anchors.get(id(parameter))) is not None:
            yield (parameter - anchor).mul_(self._mu)
