"""Measurement of the optimizer steps of a round, without the script's help."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..state.parameter_names import ParameterNames
from .gradscaler import step_is_void

_Names = frozenset[str]


@dataclass
class _Followed:
    """An optimizer that is in use."""

    names: _Names
    """Names of the model's parameters that it holds."""
    size: int
    """Number of all parameters that it holds."""
    before: int
    """Number of steps counted before its present one."""
    velocity: float | None = None


class StepMeter:
    """Meter of the steps of all optimizers that hold a model's parameters, from its creation to ``close()``.

    ``steps``: the sum of the weights with which gradients entered the parameters, the norm of a_i in Wang et al.
    (2020), section 3: the number of steps, for plain SGD. ``travel``: the same, each step times its learning rate. Of
    SGD with momentum both are found by running its recursion for a gradient of 1; another optimizer's step counts
    once. A parameter's steps are those of all optimizers that held it, one after the other; the parameter with the
    largest sum counts. For an optimizer with several learning rates, the first counts.
    """

    def __init__(self, names: ParameterNames, corrects: Callable[[torch.optim.Optimizer], bool] | None = None) -> None:
        """``corrects``, if steps must be corrected: returns whether an optimizer's latest step was."""
        self._names = names
        self._corrects = corrects
        self.uncorrected = ""
        """Class of an optimizer that took an uncorrected step, or empty."""
        # Weak references: a script may create one for every epoch, and the memory of the old one must be freed.
        self._followed: WeakKeyDictionary[torch.optim.Optimizer, _Followed] = WeakKeyDictionary()
        self._steps: dict[_Names, float] = {}
        self._travel: dict[_Names, float] = {}
        self._counted = 0
        self._handles = (
            register_optimizer_step_pre_hook(self._begins),
            register_optimizer_step_post_hook(self._stepped),
        )

    @property
    def steps(self) -> float:
        """Number of steps, weighted as described above."""
        return _largest_sum(self._steps)

    @property
    def travel(self) -> float:
        """Sum of learning rates over the steps."""
        return _largest_sum(self._travel)

    def close(self) -> None:
        """Stop measuring."""
        for handle in self._handles:
            handle.remove()

    def _begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._follow(optimizer).before = self._counted

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own, first = self._follow(optimizer), optimizer.param_groups[0]
        if not own.names or step_is_void(optimizer):
            return
        if own.before != self._counted:
            return  # an inner optimizer, as in ZeroRedundancyOptimizer, took the step and was counted
        self._counted += 1
        if self._corrects is not None and not self._corrects(optimizer):
            self.uncorrected = type(optimizer).__name__
        weight = 1.0
        if isinstance(optimizer, torch.optim.SGD) and first["momentum"]:
            momentum = first["momentum"]
            own.velocity = 1.0 if own.velocity is None else momentum * own.velocity + 1 - first["dampening"]
            weight = 1 + momentum * own.velocity if first["nesterov"] else own.velocity
        self._steps[own.names] = self._steps.get(own.names, 0.0) + weight
        self._travel[own.names] = self._travel.get(own.names, 0.0) + weight * float(first["lr"])

    def _follow(self, optimizer: torch.optim.Optimizer) -> _Followed:
        """Return the record of an optimizer, updated if parameters were added to it since its last step."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._followed.get(optimizer)
        if known is None or known.size != size:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            names = frozenset(name for parameter in parameters if (name := self._names.find(parameter)) is not None)
            known = _Followed(names, size, self._counted, known.velocity if known is not None else None)
            self._followed[optimizer] = known
        return known


def _largest_sum(amounts: Mapping[_Names, float]) -> float:
    """Return the largest sum over the optimizers that held one parameter."""
    totals: dict[str, float] = {}
    for names, amount in amounts.items():
        for name in names:
            totals[name] = totals.get(name, 0.0) + amount
    return max(totals.values(), default=0.0)
