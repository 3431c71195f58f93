"""User-defined strategies, imported from the aggregator's image."""

import errno
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TypeVar

import torch

from isthmus_contracts.manifests.manifest import ManifestError

from ..tensors import GREATEST_WEIGHT, State, TransferError, checked, first_beyond, mismatch, non_finite, specs_of
from .base import Setup, Strategy, StrategyError, Update

T = TypeVar("T")

# Errors that end when space is freed: the aggregator retries.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Custom(Strategy):
    """Wrapper of a user's class: an exception, or a result that no client can load, ends the job with a reason."""

    def __init__(self, reference: str, setup: Setup) -> None:
        """``reference``: ``module:Class``. Raises :class:`ManifestError` if there is no such strategy."""
        self._reference = reference
        self._strategy = _make(reference, setup)
        self.rebases, self.order_free = self._strategy.rebases, self._strategy.order_free
        self._model: State = {}

    def begin(self, model: State) -> None:
        self._model = model
        self._call("begin", lambda: self._strategy.begin(model))

    def accept(self, update: Update) -> None:
        self._call("accept", lambda: self._strategy.accept(update))

    def finish(self) -> State:
        result = self._tensors("finish", self._strategy.finish, "model")
        different = mismatch(specs_of(self._model), specs_of(result))
        problem = None if different is None else different.message
        if problem is None and (name := non_finite(result)) is not None:
            problem = f"{name} holds NaN or infinity"
        if problem is not None:
            raise self._error(f"finish() returned no model: {problem}")
        return {name: _bounded(result[name]) for name in self._model}

    def companion(self) -> State:
        return self._tensors("companion", self._strategy.companion, "companion")

    def state(self) -> State:
        return self._tensors("state", self._strategy.state, "state")

    def load_state(self, state: State) -> None:
        self._call("load_state", lambda: self._strategy.load_state(state))

    def _call(self, method: str, call: Callable[[], T]) -> T:
        """Call a method of the class. Any error but that of a full disk is raised as :class:`StrategyError`."""
        try:
            return call()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL_DISK:
                raise
            raise self._error(f"{method}() raised {_one_line(error)}") from error

    def _tensors(self, method: str, call: Callable[[], State], what: str) -> State:
        """Call a method of the class that returns tensors, and check that they can be stored and sent."""
        returned = self._call(method, call)
        try:
            return _plain(returned)
        except TransferError as error:
            raise self._error(f"{method}() returned no {what}: {error}") from error

    def _error(self, what: str) -> StrategyError:
        return StrategyError(f"spec.strategy.class: {self._reference}: {what}")


def _plain(returned: object) -> State:
    """Return dense tensors in main memory, without gradients. Raises :class:`TransferError` for anything else."""
    if not isinstance(returned, Mapping):
        raise TransferError(f"it is a {type(returned).__name__}, not a dict of tensors")
    tensors: State = {}
    for name, tensor in returned.items():
        if not isinstance(name, str):
            raise TransferError(f"the name {name!r} is a {type(name).__name__}, not a string")
        if checked(name, tensor).device.type != "cpu" or tensor.layout != torch.strided:
            raise TransferError(f"{name} is {tensor.layout} on {tensor.device}, not torch.strided on cpu")
        tensors[name] = tensor.detach().contiguous()
    return tensors


def _bounded(tensor: torch.Tensor) -> torch.Tensor:
    """Clamp a tensor to the bound on updates: every update from a larger model would be refused."""
    if first_beyond(GREATEST_WEIGHT, {"": tensor}) is None:
        return tensor
    return tensor.clamp(-GREATEST_WEIGHT, GREATEST_WEIGHT)


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
        make: Callable[[Setup], Strategy] = found  # the interface prescribes this constructor
        made = make(setup)
    except Exception as error:
        raise ManifestError([f"{where}: cannot be made: {_one_line(error)}"]) from error
    if made.scalars:
        problem = f"its scalars are {made.scalars!r}, which clients report for the built-in algorithms only"
        raise ManifestError([f"{where}: {problem}; leave them empty"])
    return made


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
