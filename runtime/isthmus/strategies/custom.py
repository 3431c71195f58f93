"""Strategies of a user's own, from the aggregator's image."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TypeVar

from isthmus_contracts.manifest import ManifestError

from ..tensors import State, mismatch, non_finite, specs_of
from .base import Setup, Strategy, StrategyError, Update

T = TypeVar("T")


class Custom(Strategy):
    """Around a user's class: what it raises, or a result that no client could load, ends the job with a reason."""

    def __init__(self, reference: str, setup: Setup) -> None:
        """``reference``: ``module:Class``. Raises :class:`ManifestError` where there is no such strategy."""
        self._reference = reference
        self._strategy = _make(reference, setup)
        self.scalars = tuple(self._strategy.scalars)
        self.rebases, self.order_free = self._strategy.rebases, self._strategy.order_free
        self._model: State = {}

    def begin(self, model: State) -> None:
        self._model = model
        self._call("begin", lambda: self._strategy.begin(model))

    def accept(self, update: Update) -> None:
        self._call("accept", lambda: self._strategy.accept(update))

    def finish(self) -> State:
        result = self._call("finish", self._strategy.finish)
        different = self._call("finish", lambda: mismatch(specs_of(self._model), specs_of(result)))
        problem = None if different is None else different.message
        if problem is None and (name := non_finite(result)) is not None:
            problem = f"{name} holds NaN or infinity"
        if problem is not None:
            raise StrategyError(f"spec.strategy.class: {self._reference}: finish() returned no model: {problem}")
        return {name: result[name].contiguous() for name in self._model}

    def companion(self) -> State:
        return self._call("companion", self._strategy.companion)

    def problem_with(self, scalars: Mapping[str, float]) -> str | None:
        return self._call("problem_with", lambda: self._strategy.problem_with(scalars))

    def state(self) -> State:
        return self._call("state", self._strategy.state)

    def load_state(self, state: State) -> None:
        self._call("load_state", lambda: self._strategy.load_state(state))

    def _call(self, method: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError:
            raise  # a full disk, which passes
        except Exception as error:
            raise StrategyError(
                f"spec.strategy.class: {self._reference}: {method}() raised {_one_line(error)}"
            ) from error


def _make(reference: str, setup: Setup) -> Strategy:
    module_name, _, class_name = reference.partition(":")
    where = f"spec.strategy.class: {reference}"
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ManifestError([f"{where}: {module_name} cannot be imported: {_one_line(error)}"]) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ManifestError([f"{where}: {module_name} has no {class_name}"])
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ManifestError([f"{where}: is no subclass of isthmus.strategies.Strategy"])
    try:
        make: Callable[[Setup], Strategy] = found  # the interface asks for such a constructor
        return make(setup)
    except Exception as error:
        raise ManifestError([f"{where}: cannot be made: {_one_line(error)}"]) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
