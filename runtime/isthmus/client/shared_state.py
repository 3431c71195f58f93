"""The part of a script's model that travels."""

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy

from ..tensors import State, mismatch, specs_of
from ..views import View, difference, expanded
from .names import Names, buffers_of, frozen_of, trained_of
from .session import FederationError
from .sharing import views_in

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

    Raises ``ValueError`` where ``parameters`` choose nothing, or what cannot be chosen, and for tensors that overlap.
    """

    def __init__(self, model: Model, parameters: Parameters = None) -> None:
        self._model = unwrapped(model)
        _warn_of_strange_names(self._model)
        self._chosen = None if parameters is None else _choose(self._model, parameters)
        self.views()

    def live(self) -> Mapping[str, torch.Tensor]:
        """The tensors that travel, as the model holds them now: of those that share memory, one."""
        state = self._named()
        views = {view.name for view in self._views_in(state)}
        return {name: tensor for name, tensor in state.items() if name not in views} if views else state

    def views(self) -> tuple[View, ...]:
        """The names for which another tensor travels. Raises ``ValueError`` for tensors that overlap otherwise."""
        return self._views_in(self._named())

    def require(self, views: Iterable[View]) -> None:
        """Raises :class:`FederationError` where the names of the global model share memory in another way than here."""
        if found := difference(views, self.views()):
            raise FederationError(f"the global model does not fit this script's model: {found}")

    def load(self, state: State) -> None:
        """Loads the global weights; what does not travel stays as it is. Raises :class:`FederationError`."""
        try:
            if self._chosen is not None and (unlike := mismatch(specs_of(state), specs_of(self.live()))):
                raise RuntimeError(unlike)
            state = expanded(state, (view for view in self.views() if view.of in state))
            if self._chosen is None:
                self._model.load_state_dict(state)
                return
            if isinstance(self._model, torch.nn.Module):
                self._model.load_state_dict(state, strict=False)
            else:
                self._model.load_state_dict({**self._model.state_dict(), **state})
        except RuntimeError as error:
            raise FederationError(f"the global model does not fit this script's model: {error}") from None

    def buffers(self, live: Mapping[str, torch.Tensor]) -> list[str]:
        """The names among ``live`` that no optimizer trains, by whatever name."""
        return self._all_in(live, buffers_of(self._model, self._named()))

    def frozen(self, live: Mapping[str, torch.Tensor]) -> list[str]:
        """The names among ``live`` of parameters without a gradient: what moves them is not gradient descent."""
        state = self._named()
        buffers = self.buffers(live)
        untrained = [*buffers_of(self._model, state), *frozen_of(self._model, state)]
        return [name for name in self._all_in(live, untrained) if name not in buffers]

    def names(self) -> Names:
        """Finds the names of the parameters that travel."""
        state = self._named()
        return Names.of(self._model, state, self._views_in(state))

    def _named(self) -> Mapping[str, torch.Tensor]:
        """The tensors that the federation is about, by all their names."""
        state = self._model.state_dict()
        return state if self._chosen is None else {name: state[name] for name in self._chosen}

    def _views_in(self, state: Mapping[str, torch.Tensor]) -> tuple[View, ...]:
        """Views, as the module's own tensors lie; ``state_dict()`` may return copies."""
        if not isinstance(self._model, torch.nn.Module):
            return views_in(state)
        own = dict(chain(
            self._model.named_buffers(remove_duplicate=False), self._model.named_parameters(remove_duplicate=False)
        ))  # fmt: skip
        like = {name: own.get(name, tensor) for name, tensor in state.items()}
        return views_in({name: t if _alike(t, state[name]) else state[name] for name, t in like.items()})

    def _all_in(self, live: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[str]:
        """Which of ``live`` are in ``names`` by every name that they have."""
        names = set(names)
        others = {view.of for view in self.views() if view.name not in names}
        return [name for name in live if name in names and name not in others]


def _alike(tensor: torch.Tensor, other: object) -> bool:
    return (
        isinstance(other, torch.Tensor)
        and not is_lazy(tensor)
        and tensor.shape == other.shape
        and tensor.dtype == other.dtype
    )


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
