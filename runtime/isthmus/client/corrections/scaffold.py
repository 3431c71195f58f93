"""Client side of SCAFFOLD."""

from collections.abc import Mapping

import torch

from ...tensors import State
from ..state.parameter_names import ParameterNames
from .base import DriftCorrection, positive


class ControlVariates(DriftCorrection):
    """Correction of every gradient by c - c_i; then c_i becomes c_i - c - change / travel.

    Karimireddy et al. (2020), algorithm 1, option II; travel is the sum of the learning rates over the steps. It is
    exact for SGD, as in the paper, and an approximation for optimizers that rescale gradients.
    """

    name = "SCAFFOLD"

    def __init__(self, names: ParameterNames, memory: State, control: State) -> None:
        super().__init__(names, memory)
        self._control = control

    def constant(self, name: str) -> torch.Tensor | None:
        control, own = self._control.get(name), self._memory.get(name)
        if control is None or own is None:
            return control if own is None else -own
        return control - own

    def next_state(self, name: str, change: torch.Tensor) -> torch.Tensor:
        own = change.div(-positive(self._meter.travel, self.name))
        constant = self._corrections.get(name)
        return own if constant is None else own.sub_(constant.to("cpu", own.dtype))

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        super().scalars(metrics)
        return {"travel": positive(self._meter.travel, self.name)}
