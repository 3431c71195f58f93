"""Terms that a correction adds to gradients, just before an optimizer uses them."""

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
    """Adds a parameter's terms to its gradient, in every step of the optimizers that were hooked, until ``close()``.

    A step that is given a closure makes its gradients by calling it, once or (LBFGS) many times; what was there before
    may be zeroed in it. So there the terms are added after each of these calls, and otherwise before the step.
    Where an optimizer leaves steps to others inside of it, the terms are added in theirs: a wrapper may make the
    gradients within its own step (Opacus), or not call hooks (Accelerate, many copies of Lookahead).
    """

    def __init__(self, terms: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> None:
        self._terms = terms
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, torch.Tensor] = {}
        self._before_it: dict[int, list[torch.Tensor]] = {}
        # The optimizers that were hooked, and of each the ids of the parameters that it leaves to those inside of it.
        self._left: WeakKeyDictionary[torch.optim.Optimizer, frozenset[int]] = WeakKeyDictionary()

    def hook(self, optimizer: torch.optim.Optimizer, corrected: Iterable[torch.Tensor]) -> None:
        """Hooks into an optimizer; ``corrected``: those of its parameters that may have terms.

        Raises ``ValueError`` for an optimizer that could not use the gradients, or whose steps cannot be reached.
        """
        corrected = list(corrected)
        parts = [optimizer, *inner_optimizers(optimizer)]
        if corrected and any(isinstance(part, torch.optim.SparseAdam) for part in parts):
            raise ScriptError(
                "SparseAdam takes only sparse gradients, and the job's strategy adds to them what is dense:"
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
        """Tell whether a step was corrected that an optimizer has just taken without another inside of it."""
        return optimizer in self._left and not self._left[optimizer]

    def _hook(self, optimizer: Any) -> bool:
        if not calls_hooks(optimizer):
            return False
        if optimizer not in self._left:
            self._left[optimizer] = frozenset()
            self._handles.append(optimizer.register_step_pre_hook(self._before))
        return True

    def close(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
        if _is_repeated(optimizer):
            return None
        # Some make the optimizer inside of them again when parameters are added.
        inside = [part for part in inner_optimizers(optimizer) if self._hook(part)]
        self._left[optimizer] = frozenset(id(parameter) for part in inside for parameter in parameters_of(part))
        if self._left[optimizer] and all(id(each) in self._left[optimizer] for each in parameters_of(optimizer)):
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
        scale, left = gradient_scale(optimizer), self._left[optimizer]
        with torch.no_grad():
            for parameter in parameters_of(optimizer):
                if parameter.grad is None or id(parameter) in left or self._has_moved(parameter):
                    continue
                for term in self._terms(parameter):
                    if parameter.grad.is_sparse:
                        parameter.grad = parameter.grad.to_dense()
                    add_unscaled(parameter.grad, term, scale)

    def _has_moved(self, parameter: torch.Tensor) -> bool:
        """Return whether another parameter's gradient brings the term to the same values."""
        return any(other.grad is not None for other in self._before_it.get(id(parameter), ()))


def _is_repeated(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a hook is called for a step within a step of the same optimizer.

    So it is where a class's ``step`` calls that of the class below it, and torch calls the hooks in each of them.
    """
    frame = sys._getframe(2)  # torch's function that calls the hooks
    code, above = frame.f_code, frame.f_back
    while above is not None:
        if above.f_code is code and above.f_locals.get("self") is optimizer:
            return True
        above = above.f_back
    return False
