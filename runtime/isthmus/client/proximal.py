"""FedProx on the client's side: the proximal term's gradient, added before every optimizer step."""

from collections.abc import Iterator

import torch

from .correction import Correction
from .names import Names
from .terms import GradientTerms


class ProximalTerm(Correction):
    """Adds mu * (w - w_global) to the gradients: the gradient of (mu / 2) * ||w - w_global||^2.

    Li et al., "Federated Optimization in Heterogeneous Networks" (2020), algorithm 2. Parameters that do not travel
    have no global value, and are left alone.
    """

    def __init__(self, mu: float, names: Names) -> None:
        self._mu = mu
        self._names = names
        self._anchors: dict[int, torch.Tensor] = {}
        self._terms = GradientTerms(self._term)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the parameters' present values as the global ones, and hooks into ``optimizer.step``."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        travelling = [parameter for parameter in parameters if not self._names.leave_out(parameter)]
        for parameter in travelling:
            if id(parameter) not in self._anchors:
                self._anchors[id(parameter)] = parameter.detach().clone()
        self._terms.hook(optimizer, travelling)

    def close(self) -> None:
        self._terms.close()
        self._anchors.clear()

    def _term(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        if (anchor := self._anchors.get(id(parameter))) is not None:
            yield (parameter - anchor).mul_(self._mu)
