"""Client side of FedDyn."""

import torch

from ...tensors import State
from ..state.parameter_names import ParameterNames
from .base import DriftCorrection


class DynamicRegularizer(DriftCorrection):
    """Correction for the local loss L(w) - <g, w> + (alpha / 2) ||w - w_global||^2; then g becomes g - alpha change.

    Acar et al. (2021), algorithm 1; g approximates the gradient of the local loss where training ended.
    """

    name = "FedDyn"

    def __init__(self, names: ParameterNames, memory: State, alpha: float) -> None:
        super().__init__(names, memory)
        self._alpha = alpha

    def constant(self, name: str) -> torch.Tensor | None:
        return -self._memory[name] if name in self._memory else None

    def moving(self, parameter: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor | None:
        return (parameter - anchor).mul_(self._alpha)

    def next_state(self, name: str, change: torch.Tensor) -> torch.Tensor:
        own = change.mul(-self._alpha)
        return own.add_(self._memory[name].to(own.dtype)) if name in self._memory else own
