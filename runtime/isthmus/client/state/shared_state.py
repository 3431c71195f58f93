"""The part of a script's model that is shared with the federation."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy

from isthmus_contracts.pb.federation_pb2 import TensorSpec
from isthmus_contracts.text import one_line

from ...tensors import State, TransferError, checked, mismatch, specs_of
from ...views import View, difference, expanded
from ..errors import FederationError, ScriptError
from ..script_values import shown
from .parameter_names import ParameterNames, buffers_of, frozen_of, named_parameters, trained_of
from .tied_tensors import views_in
from .wrappers import plain_names, wrapped_in

log = logging.getLogger("isthmus")

Parameters = str | Iterable[str] | Callable[[str], bool] | None
"""Choice of the tensors that are shared: ``"trainable"``, patterns, a predicate on names, or ``None`` for all."""

_SHOWN_NAMES = 5
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
_ADVICE = "use isthmus.rounds(..., parameters=...) to leave out tensors that stay at the client"


class Model(Protocol):
    """Model that can be trained: a ``torch.nn.Module``, or any object with these two methods."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


class SharedState:
    """A model's state as the federation sees it: without wrappers, and without the tensors that stay at this client.

    Raises :class:`ScriptError` if ``parameters`` is invalid or chooses nothing, for values that cannot be sent, and for
    tensors that overlap.
    """

    def __init__(self, model: Model, parameters: Parameters = None) -> None:
        _require_model(model)
        self._model = unwrapped(model)
        self._chosen = None if parameters is None else _choose(self._model, self._entries(), parameters)
        named = self._named()
        for name, tensor in named.items():
            try:
                checked(name, tensor)
            except TransferError as error:
                raise ScriptError(f"the model's state cannot be sent: {error}; {_ADVICE}") from None
        if self._chosen is None:
            _warn_of_strange_names(self._model, named)
        self.views()

    def live(self) -> Mapping[str, torch.Tensor]:
        """Return the shared tensors as the model holds them now; of tensors that share memory, only one."""
        state = self._named()
        views = {view.name for view in self._views_in(state)}
        return {name: tensor for name, tensor in state.items() if name not in views} if views else state

    def views(self) -> tuple[View, ...]:
        """Return the names that are views of another shared tensor. Raises ``ValueError`` for other overlaps."""
        return self._views_in(self._named())

    def require(self, views: Iterable[View]) -> None:
        """Raise :class:`FederationError` if names of the global model share memory in another way than here."""
        if found := difference(views, self.views()):
            raise FederationError(f"the global model does not fit this script's model: {found}")

    def require_fitting(self, specs: Iterable[TensorSpec]) -> None:
        """Refuse a global model that a module cannot load, before memory is allocated for it.

        Raises :class:`FederationError`.
        """
        if not isinstance(self._model, torch.nn.Module):
            return
        shapes = {name: list(tensor.shape) for name, tensor in self._named().items()}
        for spec in specs:
            if shapes.get(spec.name) != list(spec.shape):
                wanted = f"of shape {shapes[spec.name]}" if spec.name in shapes else "missing"
                name, shape = one_line(spec.name, 100), one_line(str(list(spec.shape[:16])), 100)
                raise FederationError(
                    f"the global model does not fit this script's model: {name} has shape {shape}, and is {wanted} here"
                )

    def load(self, state: State) -> None:
        """Load the global weights; other tensors stay as they are. Raises :class:`FederationError`."""
        own = self._model.state_dict()
        actual = {plain: name for name, plain in plain_names(self._model, list(own)).items()}
        loaded: OrderedDict[str, Any] = OrderedDict()
        is_module = isinstance(self._model, torch.nn.Module)
        if self._chosen is not None and not is_module:
            loaded.update(own)
        if (versions := getattr(own, "_metadata", None)) is not None:
            loaded._metadata = versions  # type: ignore[attr-defined]  # torch keeps the modules' versions here
        try:
            if self._chosen is not None and (unlike := mismatch(specs_of(state), specs_of(self.live()))):
                raise RuntimeError(unlike)
            everything = expanded(state, (view for view in self.views() if view.of in state))
            loaded.update((actual.get(name, name), tensor) for name, tensor in everything.items())
            if self._chosen is not None and is_module:
                self._model.load_state_dict(loaded, strict=False)  # type: ignore[call-arg]
            else:
                self._model.load_state_dict(loaded)
        except RuntimeError as error:
            raise FederationError(f"the global model does not fit this script's model: {error}") from None

    def buffers(self, live: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the names in ``live`` that no optimizer trains, under any of their names."""
        return self._all_in(live, buffers_of(self._model, self._named()))

    def frozen(self, live: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the names in ``live`` of parameters without a gradient: gradient descent does not change them."""
        state = self._named()
        buffers = self.buffers(live)
        untrained = [*buffers_of(self._model, state), *frozen_of(self._model, state)]
        return [name for name in self._all_in(live, untrained) if name not in buffers]

    def names(self) -> ParameterNames:
        """Return the names of the shared parameters."""
        state = self._named()
        return ParameterNames.of(self._model, state, self._views_in(state))

    def _entries(self) -> dict[str, Any]:
        """Return all entries of the model's state, by their names without wrappers."""
        state = self._model.state_dict()
        names = plain_names(self._model, list(state))
        return {names[name]: value for name, value in state.items()}

    def _named(self) -> Mapping[str, torch.Tensor]:
        """Return the shared tensors, by all their names."""
        state = self._entries()
        return state if self._chosen is None else {name: state[name] for name in self._chosen}

    def _views_in(self, state: Mapping[str, torch.Tensor]) -> tuple[View, ...]:
        """Return the views among the module's own tensors, since ``state_dict()`` may return copies."""
        if not isinstance(self._model, torch.nn.Module):
            return views_in(state)
        buffers = dict(self._model.named_buffers(remove_duplicate=False))
        names = plain_names(self._model, list(buffers))
        own = {names[name]: buffer for name, buffer in buffers.items()} | named_parameters(self._model)
        like = {name: own.get(name, tensor) for name, tensor in state.items()}
        return views_in({name: t if _alike(t, state[name]) else state[name] for name, t in like.items()})

    def _all_in(self, live: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[str]:
        """Return the names in ``live`` all of whose aliases are in ``names``."""
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
    """Return the script's own model, without its wrappers.

    Raises :class:`ScriptError` for a sharded model.
    """
    for part in model.modules() if isinstance(model, torch.nn.Module) else (model,):
        if any(kind.__name__ in _SHARDED for kind in type(part).__mro__):
            raise ScriptError(
                "the model is sharded (FSDP), so no rank holds all of it:"
                " use torch.nn.parallel.DistributedDataParallel, or no process group"
            )
    while (found := wrapped_in(model)) is not None:
        model = found[1]
    return model


def _require_model(model: object) -> None:
    wanted = "isthmus.rounds() takes the model itself: a torch.nn.Module, or an object with state_dict() and"
    wanted = f"{wanted} load_state_dict()"
    if isinstance(model, type):
        raise ScriptError(f"{wanted}, not the class {model.__name__}: make one, {model.__name__}(...)")
    if not all(callable(getattr(model, method, None)) for method in ("state_dict", "load_state_dict")):
        raise ScriptError(f"{wanted}, not {shown(model)}")


def _warn_of_strange_names(model: Model, live: Mapping[str, torch.Tensor]) -> None:
    """Warn if no tensor of the state is a parameter: strategies distinguish weights from statistics by parameters."""
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        return
    if not trained_of(model, live):
        log.warning(
            "none of the model's parameters is found in its state_dict(), which returns copies under other names:"
            " its tensors are averaged like statistics, and no strategy can correct or count its training"
        )


def _choose(
    model: Model, state: Mapping[str, Any], parameters: str | Iterable[str] | Callable[[str], bool]
) -> tuple[str, ...]:
    names = list(state)
    if isinstance(parameters, str):
        if parameters != "trainable":
            raise ScriptError(
                f'parameters must be "trainable", a list of patterns or a function, not {parameters!r}:'
                f" for a single pattern pass [{parameters!r}]"
            )
        if not isinstance(model, torch.nn.Module):
            raise ScriptError(f'parameters="trainable" needs a torch.nn.Module, not a {type(model).__name__}')
        trainable = {name for name, parameter in named_parameters(model).items() if parameter.requires_grad}
        chosen = tuple(name for name in names if name in trainable)
        if not chosen:
            raise ScriptError('parameters="trainable": no parameter of the model requires a gradient')
        return chosen
    if callable(parameters):
        chosen = tuple(name for name in names if parameters(name))
        if not chosen:
            raise ScriptError(f"the parameters function chose none of the model's tensors: {_shown(names)}")
        return chosen
    patterns = list(parameters) if isinstance(parameters, Iterable) else [parameters]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ScriptError(
            f'parameters must be "trainable", a list of patterns or a function, not {shown(parameters)}:'
            " names and patterns are strings"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ScriptError(f"parameters: {pattern!r} matches none of the model's tensors: {_shown(names)}")
    if not patterns:
        raise ScriptError("parameters is an empty list, so nothing would be sent")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
