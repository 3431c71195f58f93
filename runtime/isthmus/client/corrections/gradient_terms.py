"""Terms that a correction adds to gradients just before an optimizer uses them."""

import sys
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import ScriptError
from ..state.tied_tensors import overlap, overlapping
from .gradscaler import add_unscaled, gradient_scale
from .optimizers import calls_hooks, inner_optimizers, parameters_of

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class GradientTerms:
    """Hooks that add terms to parameters' gradients in every step of the hooked optimizers, until ``close()``.

    A step with a closure computes its gradients by calling the closure, once or (LBFGS) many times, and the closure may
    zero earlier ones. So the terms are added after each call of the closure, and otherwise before the step.
    If an optimizer delegates steps to inner optimizers, the terms are added in their steps: a wrapper may compute the
    gradients within its own step (Opacus), or not call hooks (Accelerate, many copies of Lookahead).
    """

    def __init__(self, terms: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> None:
        self._terms = terms
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, torch.Tensor] = {}
        self._larger: dict[int, list[torch.Tensor]] = {}
        # By hooked optimizer: the ids of the parameters whose steps it delegates to inner optimizers.
        self._delegated: WeakKeyDictionary[torch.optim.Optimizer, frozenset[int]] = WeakKeyDictionary()

    def hook(self, optimizer: torch.optim.Optimizer, corrected: Iterable[torch.Tensor]) -> None:
        """Hook into an optimizer; ``corrected``: those of its parameters that may have terms.

        Raises ``ValueError`` for an optimizer that cannot use dense gradients, or whose steps call no hooks.
        """
        corrected = list(corrected)
        parts = [optimizer, *inner_optimizers(optimizer)]
        if corrected and any(isinstance(part, torch.optim.SparseAdam) for part in parts):
            raise ScriptError(
                "SparseAdam takes only sparse gradients, and the job's strategy adds dense terms to them:"
                " use another optimizer (SGD, Adagrad, Adam), or a strategy that leaves gradients alone (FedAvg)"
            )
        self._hooked.update((id(parameter), parameter) for parameter in corrected)
        self._order()
        hooked = [part for part in parts if self._hook(part)]
        reached = {id(parameter) for part in hooked for parameter in parameters_of(part)}
        if not all(id(parameter) in reached for parameter in corrected):
            raise ScriptError(
                f"{type(optimizer).__name__} takes its steps by itself, without the hooks of torch.optim.Optimizer, so"
                " the correction of the job's strategy cannot reach them: call super().__init__() in its __init__(),"
                " or use a strategy that leaves gradients alone (FedAvg)"
            )

    def corrects(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the step that an optimizer itself has just taken was corrected."""
        return optimizer in self._delegated and not self._delegated[optimizer]

    def _hook(self, optimizer: Any) -> bool:
        if not calls_hooks(optimizer):
            return False
        if optimizer not in self._delegated:
            self._delegated[optimizer] = frozenset()
            self._handles.append(optimizer.register_step_pre_hook(self._before))
        return True

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._larger.clear()

    def _order(self) -> None:
        """Find parameters that share values, as enc.weight and Parameter(enc.weight.t()) do.

        Each of them moves the values by its own gradient, but a term must move them only once: with the largest one.
        """
        hooked = list(self._hooked.values())
        for group in overlapping(hooked):
            ranked = sorted((hooked[index] for index in group), key=lambda parameter: -parameter.numel())
            for place, parameter in enumerate(ranked):
                self._larger[id(parameter)] = [other for other in ranked[:place] if overlap(parameter, other)]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        if _is_repeated(optimizer):
            return None
        # Some wrappers create their inner optimizer again when parameters are added.
        inside = [part for part in inner_optimizers(optimizer) if self._hook(part)]
        self._delegated[optimizer] = frozenset(id(parameter) for part in inside for parameter in parameters_of(part))
        if self._delegated[optimizer] and all(
            id(each) in self._delegated[optimizer] for each in parameters_of(optimizer)
        ):
            return None
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
        scale, delegated = gradient_scale(optimizer), self._delegated[optimizer]
        with torch.no_grad():
            for parameter in parameters_of(optimizer):
                if parameter.grad is None or id(parameter) in delegated or self._has_moved(parameter):
                    continue
                for term in self._terms(parameter):
                    if parameter.grad.is_sparse:
                        parameter.grad = parameter.grad.to_dense()
                    add_unscaled(parameter.grad, term, scale)

    def _has_moved(self, parameter: torch.Tensor) -> bool:
        """Return whether the term is added to the same values through another parameter's gradient."""
        return any(other.grad is not None for other in self._larger.get(id(parameter), ()))


def _is_repeated(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a hook is called for a step within a step of the same optimizer.

    This happens if a class's ``step`` calls that of its base class: torch calls the hooks in each of them.
    """
    frame = sys._getframe(2)  # torch's function that calls the hooks
    code, above = frame.f_code, frame.f_back
    while above is not None:
        if above.f_code is code and above.f_locals.get("self") is optimizer:
            return True
        above = above.f_back
    return False
