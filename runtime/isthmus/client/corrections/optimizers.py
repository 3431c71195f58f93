"""Optimizers that wrap other optimizers: those of Accelerate, Opacus and Lightning, Lookahead, SAM."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

# An optimizer's attributes of these names hold no other optimizers, and are large.
_DATA = frozenset({"state", "param_groups", "defaults"})


def is_optimizer(value: object) -> bool:
    """Return whether a value is an optimizer. Some wrappers are not instances of torch's class."""
    return isinstance(value, torch.optim.Optimizer) or (hasattr(type(value), "step") and hasattr(value, "param_groups"))


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that an optimizer holds, at any depth. They may take its steps for it."""
    found: list[Any] = []
    seen, waiting = {id(optimizer)}, [optimizer]
    while waiting:
        for value in _held(waiting.pop()):
            if id(value) not in seen:
                seen.add(id(value))
                found.append(value)
                waiting.append(value)
    return found


def _held(optimizer: Any) -> Iterator[Any]:
    for name, value in getattr(optimizer, "__dict__", {}).items():
        if name in _DATA:
            continue
        values: Iterable[Any] = (value,)
        if isinstance(value, list | tuple):
            values = value
        elif isinstance(value, dict):
            values = value.values()
        yield from (each for each in values if is_optimizer(each))


def calls_hooks(optimizer: Any) -> bool:
    """Return whether an optimizer's ``step()`` calls hooks.

    A wrapper that does not call ``Optimizer.__init__`` may have the hooks' dictionaries, but a ``step`` of its own.
    """
    return (
        isinstance(optimizer, torch.optim.Optimizer)
        and isinstance(getattr(optimizer, "_optimizer_step_pre_hooks", None), dict)
        and bool(getattr(type(optimizer).step, "hooked", False))
    )


def parameters_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters that an optimizer holds."""
    for group in optimizer.param_groups:
        yield from group["params"]
