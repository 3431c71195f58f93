"""The part of a script's model that travels."""

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch

from ..tensors import State, mismatch, specs_of
from .names import Names, buffers_of, frozen_of, trained_of
from .session import FederationError

log = logging.getLogger("isthmus")

Parameters = str | Iterable[str] | Callable[[str], bool] | None
"""Which tensors travel: ``"trainable"``, patterns, a predicate on names; ``None``: all of them."""

_SHOWN_NAMES = 5
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


class Model(Protocol):
    """What can be trained: a ``torch.nn.Module``, or anything else with its two methods."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


class SharedState:
    """A model's state as the federation sees it: without wrappers, and without what stays at this client.

    Raises ``ValueError`` where ``parameters`` choose nothing, or what cannot be chosen.
    """

    def __init__(self, model: Model, parameters: Parameters = None) -> None:
        self._model = unwrapped(model)
        _warn_of_strange_names(self._model)
        self._chosen = None if parameters is None else _choose(self._model, parameters)

    def live(self) -> Mapping[str, torch.Tensor]:
        """The tensors that travel, as the model holds them now."""
        state = self._model.state_dict()
        return state if self._chosen is None else {name: state[name] for name in self._chosen}

    def load(self, state: State) -> None:
        """Loads the global weights; what does not travel stays as it is. Raises :class:`FederationError`."""
        try:
            if self._chosen is None:
                self._model.load_state_dict(state)
                return
            if difference := mismatch(specs_of(state), specs_of(self.live())):
                raise RuntimeError(difference)
            if isinstance(self._model, torch.nn.Module):
                self._model.load_state_dict(state, strict=False)
            else:
                self._model.load_state_dict({**self._model.state_dict(), **state})
        except RuntimeError as error:
            raise FederationError(f"the global model does not fit this script's model: {error}") from None

    def buffers(self, live: Mapping[str, torch.Tensor]) -> list[str]:
        """The names among ``live`` that no optimizer trains."""
        return buffers_of(self._model, live)

    def frozen(self, live: Mapping[str, torch.Tensor]) -> list[str]:
        """The names among ``live`` of parameters without a gradient: what moves them is not gradient descent."""
        return frozen_of(self._model, live)

    def names(self) -> Names:
        """Finds the names of the parameters that travel."""
        return Names.of(self._model, self.live())


def unwrapped(model: Model) -> Model:
    """The script's own model: DistributedDataParallel, DataParallel and torch.compile prefix the names of its tensors.

    Raises ``ValueError`` for a sharded one.
    """
    while True:
        if any(kind.__name__ in _SHARDED for kind in type(model).__mro__):
            raise ValueError(
                "the model is sharded (FSDP), so no rank holds all of it:"
                " use torch.nn.parallel.DistributedDataParallel, or no process group"
            )
        if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model


def _warn_of_strange_names(model: Model) -> None:
    """Strategies tell what is trained from what is counted by the module's own parameters."""
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        return
    if not trained_of(model, model.state_dict()):
        log.warning(
            "none of the model's parameters is found in its state_dict(), which gives copies under other names:"
            " its tensors are averaged as statistics are, and no strategy can correct or count its training"
        )


def _choose(model: Model, parameters: str | Iterable[str] | Callable[[str], bool]) -> tuple[str, ...]:
    names = list(model.state_dict())
    if isinstance(parameters, str):
        if parameters != "trainable":
            raise ValueError(
                f'parameters must be "trainable", a list of patterns or a function, not {parameters!r}:'
                f" for a single pattern say [{parameters!r}]"
            )
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f'parameters="trainable" needs a torch.nn.Module, not a {type(model).__name__}')
        trainable = {
            name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
        }
        chosen = tuple(name for name in names if name in trainable)
        if not chosen:
            raise ValueError('parameters="trainable": no parameter of the model requires a gradient')
        return chosen
    if callable(parameters):
        chosen = tuple(name for name in names if parameters(name))
        if not chosen:
            raise ValueError(f"the parameters function chose none of the model's tensors: {_shown(names)}")
        return chosen
    patterns = list(parameters)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"parameters: {pattern!r} matches none of the model's tensors: {_shown(names)}")
    if not patterns:
        raise ValueError("parameters is an empty list, so nothing would travel")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
