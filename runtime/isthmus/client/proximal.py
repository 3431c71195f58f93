"""FedProx on the client's side: the proximal term's gradient, added before every optimizer step."""

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .correction import Correction
from .gradscaler import add_unscaled, gradient_scale
from .names import Names


class ProximalTerm(Correction):
    """Adds mu * (w - w_global) to the gradients: the gradient of (mu / 2) * ||w - w_global||^2.

    Li et al., "Federated Optimization in Heterogeneous Networks" (2020), algorithm 2. Parameters that do not travel
    have no global value, and are left alone.
    """

    def __init__(self, mu: float, names: Names) -> None:
        self._mu = mu
        self._names = names
        self._anchors: dict[int, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the parameters' present values as the global ones, and hooks into ``optimizer.step``."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not self._names.leave_out(parameter) and id(parameter) not in self._anchors:
                    self._anchors[id(parameter)] = parameter.detach().clone()
        self._handles.append(optimizer.register_step_pre_hook(self._add_gradient))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._anchors.clear()

    def _add_gradient(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scale = gradient_scale(optimizer)
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    anchor = self._anchors.get(id(parameter))
                    if parameter.grad is not None and anchor is not None:
                        add_unscaled(parameter.grad, (parameter - anchor).mul_(self._mu), scale)
