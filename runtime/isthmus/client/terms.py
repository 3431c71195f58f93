"""Terms that a correction adds to gradients, just before an optimizer uses them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .gradscaler import add_unscaled, gradient_scale
from .sharing import overlap, overlapping

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class GradientTerms:
    """Adds a parameter's terms to its gradient, in every step of the optimizers that were hooked, until ``close()``.

    A step that is given a closure makes its gradients by calling it, once or (LBFGS) many times; what was there before
    may be zeroed in it. So there the terms are added after each of these calls, and otherwise before the step.
    """

    def __init__(self, terms: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> None:
        self._terms = terms
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, torch.Tensor] = {}
        self._before_it: dict[int, list[torch.Tensor]] = {}

    def hook(self, optimizer: torch.optim.Optimizer, corrected: Iterable[torch.Tensor]) -> None:
        """Hooks into an optimizer; ``corrected``: those of its parameters that may have terms.

        Raises ``ValueError`` for an optimizer that could not use the gradients.
        """
        corrected = list(corrected)
        if corrected and isinstance(optimizer, torch.optim.SparseAdam):
            raise ValueError(
                "SparseAdam takes only sparse gradients, and the job's strategy adds to them what is dense:"
                " use another optimizer (SGD, Adagrad, Adam), or a strategy that leaves gradients alone (FedAvg)"
            )
        self._hooked.update((id(parameter), parameter) for parameter in corrected)
        self._order()
        self._handles.append(optimizer.register_step_pre_hook(self._before))

    def close(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._hooked.clear()
        self._before_it.clear()

    def _order(self) -> None:
        """Finds parameters that share values, as enc.weight and Parameter(enc.weight.t()) do.

        Each of them moves the values by its own gradient, but a term is to move them once: with the largest parameter.
        """
        hooked = list(self._hooked.values())
        for group in overlapping(hooked):
            ranked = sorted((hooked[index] for index in group), key=lambda parameter: -parameter.numel())
            for place, parameter in enumerate(ranked):
                self._before_it[id(parameter)] = [other for other in ranked[:place] if overlap(parameter, other)]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        positional = len(args) > 1  # the optimizer itself is the first
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._add(optimizer)
            return None

        def corrected() -> Any:
            loss = closure()
            self._add(optimizer)
            return loss

        return ((args[0], corrected, *args[2:]), kwargs) if positional else (args, {**kwargs, "closure": corrected})

    def _add(self, optimizer: torch.optim.Optimizer) -> None:
        scale = gradient_scale(optimizer)
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None or self._has_moved(parameter):
                        continue
                    for term in self._terms(parameter):
                        if parameter.grad.is_sparse:
                            parameter.grad = parameter.grad.to_dense()
                        add_unscaled(parameter.grad, term, scale)

    def _has_moved(self, parameter: torch.Tensor) -> bool:
        """Whether another parameter's gradient brings the term to the same values."""
        return any(other.grad is not None for other in self._before_it.get(id(parameter), ()))
