"""Counts what a script's optimizers do in a round, without being told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..state.parameter_names import Names
from .gradscaler import step_is_void

_Names = frozenset[str]


@dataclass
class _Followed:
    """An optimizer that is in use."""

    names: _Names
    """Those of the model's parameters that it holds."""
    size: int
    """The number of all that it holds."""
    before: int
    """How many steps had been counted when its present one began."""
    velocity: float | None = None


class StepMeter:
    """Measures the steps of every optimizer that holds parameters of a model, from its creation to ``close()``.

    ``steps``: the sum of the weights with which gradients entered the parameters, the norm of a_i in Wang et al.
    (2020), section 3: the number of steps, for plain SGD. ``travel``: the same, each step times its learning rate. Of
    SGD with momentum both are found by running its recursion for a gradient of 1; another optimizer's step counts
    once. A parameter's steps are those of all optimizers that held it, one after the other, and the parameter that went
    farthest counts; of an optimizer with several learning rates, its first.
    """

    def __init__(self, names: Names, corrects: Callable[[torch.optim.Optimizer], bool] | None = None) -> None:
        """``corrects`` tells whether the step that an optimizer has just taken was corrected, where steps should be."""
        self._names = names
        self._corrects = corrects
        self.uncorrected = ""
        """The class of an optimizer that took a step without a correction; empty: none did."""
        # Weakly: a script that makes a new one for every epoch wants the memory of the old one, and its id, back.
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
        return _farthest(self._steps)

    @property
    def travel(self) -> float:
        return _farthest(self._travel)

    def close(self) -> None:
        """Stops measuring."""
        for handle in self._handles:
            handle.remove()

    def _begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._follow(optimizer).before = self._counted

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own, first = self._follow(optimizer), optimizer.param_groups[0]
        if not own.names or step_is_void(optimizer):
            return
        if own.before != self._counted:
            return  # one inside of it, as in ZeroRedundancyOptimizer, took the step, and was counted
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
        """Return what is known of an optimizer. Parameters may be added to it between two steps."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._followed.get(optimizer)
        if known is None or known.size != size:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            names = frozenset(name for parameter in parameters if (name := self._names.find(parameter)) is not None)
            known = _Followed(names, size, self._counted, known.velocity if known is not None else None)
            self._followed[optimizer] = known
        return known


def _farthest(amounts: Mapping[_Names, float]) -> float:
    """The most that came together at one name."""
    totals: dict[str, float] = {}
    for names, amount in amounts.items():
        for name in names:
            totals[name] = totals.get(name, 0.0) + amount
    return max(totals.values(), default=0.0)
