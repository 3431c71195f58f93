"""Counts what a script's optimizers do in a round, without being told."""

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .gradscaler import step_is_void
from .names import Names


class StepMeter:
    """Measures the steps of every optimizer that holds parameters of a model, from its creation to ``close()``.

    ``steps``: the sum of the weights with which gradients entered the parameters, the norm of a_i in Wang et al.
    (2020), section 3: the number of steps, for plain SGD. ``travel``: the same, each step times its learning rate. Of
    SGD with momentum both are found by running its recursion for a gradient of 1; another optimizer's step counts
    once. Of several optimizers the one that went farthest counts; of one with several learning rates, its first.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._velocities: dict[int, float] = {}
        self._steps: dict[int, float] = {}
        self._travel: dict[int, float] = {}
        self._handle = register_optimizer_step_post_hook(self._stepped)

    @property
    def steps(self) -> float:
        return max(self._steps.values(), default=0.0)

    @property
    def travel(self) -> float:
        return max(self._travel.values(), default=0.0)

    def close(self) -> None:
        """Stops measuring."""
        self._handle.remove()

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        groups = optimizer.param_groups
        if not any(self._names.find(parameter) is not None for group in groups for parameter in group["params"]):
            return
        if step_is_void(optimizer):
            return
        key, first = id(optimizer), groups[0]
        weight = 1.0
        if isinstance(optimizer, torch.optim.SGD) and first["momentum"]:
            momentum, earlier = first["momentum"], self._velocities.get(key)
            velocity = 1.0 if earlier is None else momentum * earlier + 1 - first["dampening"]
            self._velocities[key] = velocity
            weight = 1 + momentum * velocity if first["nesterov"] else velocity
        self._steps[key] = self._steps.get(key, 0.0) + weight
        self._travel[key] = self._travel.get(key, 0.0) + weight * float(first["lr"])
