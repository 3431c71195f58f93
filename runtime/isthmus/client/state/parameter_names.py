"""Names of the tensors in a model's state that optimizers train."""

from collections.abc import Iterable, Mapping
from typing import Self

import torch

from ...tensors import impediment
from ...views import View
from .wrappers import plain_names

_Place = tuple[int, torch.Size, tuple[int, ...], torch.device]


class ParameterNames:
    """Names, in the shared state, of the parameters that optimizers hold.

    A module's parameters are identified as objects, since their values may move (to a GPU, for example) during the
    round. For a model that is not a module, only the address of the values is known.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], places: Mapping[_Place, str] | None = None,
        views: Iterable[View] = (), wholes: Mapping[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """``views``: views among the parameters; ``wholes``: the tensors that they are views of."""
        self._parameters = dict(parameters)  # keeps them alive, so that their ids are not reused
        self._by_object = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        self._places = places
        self._views = {view.name: view for view in views}
        self._wholes = dict(wholes or {})

    @classmethod
    def of(cls, model: object, live: Mapping[str, torch.Tensor], views: Iterable[View] = ()) -> Self:
        """Return the names of a model's trained parameters in ``live``; the first name of tied ones.

        ``live`` holds tied parameters under all their names.
        """
        views = tuple(views)
        wholes = {view.of: live[view.of] for view in views}
        if isinstance(model, torch.nn.Module):
            trained = {
                name: parameter for name, parameter in trained_of(model, live).items() if live[name].is_floating_point()
            }
            return cls(trained, views=views, wholes=wholes | {of: trained[of] for of in wholes.keys() & trained.keys()})
        buffers = set(buffers_of(model, live))
        places: dict[_Place, str] = {}
        for name, tensor in live.items():
            if name not in buffers and has_place(tensor) and tensor.is_floating_point():
                places.setdefault(_place(tensor), name)
        return cls({}, places, views, wholes)

    def find(self, parameter: torch.Tensor) -> str | None:
        """Return the name of the tensor that is sent for a parameter; ``None`` if none is, or it is not the model's."""
        name = self._own_name(parameter)
        return self._views[name].of if name in self._views else name

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the tensor that is sent for a parameter: itself, unless it is a view of another one."""
        view = self._views.get(self._own_name(parameter) or "")
        return parameter if view is None or self._is_all(view, parameter) else self._wholes[view.of]

    def part(self, parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the parameter's part of values for the whole tensor that is sent for it."""
        view = self._views.get(self._own_name(parameter) or "")
        return values if view is None or self._is_all(view, parameter) else view.within(values)

    def leave_out(self, parameter: torch.Tensor) -> bool:
        """Return whether it is certain that the parameter is not sent."""
        return self._places is None and id(parameter) not in self._by_object

    def _own_name(self, parameter: torch.Tensor) -> str | None:
        if self._places is not None:
            return self._places.get(_place(parameter)) if has_place(parameter) else None
        return self._by_object.get(id(parameter))

    def _is_all(self, view: View, parameter: torch.Tensor) -> bool:
        """Return whether a view holds all values of its tensor, in the same shape."""
        whole = self._wholes[view.of]
        return whole.shape == parameter.shape and whole.stride() == parameter.stride()


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return a module's parameters by their names without wrappers; tied ones have several."""
    named = dict(model.named_parameters(remove_duplicate=False))
    names = plain_names(model, list(named))
    return {names[name]: parameter for name, parameter in named.items()}


def trained_of(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a module's parameters by their names in its state; tied ones have several.

    They are matched by name, which also works if ``state_dict()`` returns copies (on the CPU, for example), or, if it
    renames them, by address.
    """
    named = named_parameters(model)
    placed = {_place(parameter): parameter for parameter in named.values() if has_place(parameter)}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        parameter = named.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            parameter = placed.get(_place(tensor)) if has_place(tensor) else None
        if parameter is not None:
            found[name] = parameter
    return found


def buffers_of(model: object, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names in a model's state that are not parameters: batch-norm statistics, counters.

    If the model is not a ``torch.nn.Module`` and has no ``parameters()``, every tensor may be trained.
    """
    if isinstance(model, torch.nn.Module):
        trained = trained_of(model, state)
        return [name for name in state if name not in trained]
    parameters = getattr(model, "parameters", None)
    if not callable(parameters):
        return []
    places = {_place(parameter) for parameter in parameters() if has_place(parameter)}
    return [name for name, tensor in state.items() if not has_place(tensor) or _place(tensor) not in places]


def frozen_of(model: object, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names in a module's state of parameters that require no gradient, and have none.

    Some scripts (of GANs, for example) switch ``requires_grad`` off and on; the parameters that they train have a
    gradient nevertheless.
    """
    if not isinstance(model, torch.nn.Module):
        return []
    trained = trained_of(model, state)
    return [name for name, parameter in trained.items() if not parameter.requires_grad and parameter.grad is None]


def has_place(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has its values in one piece of memory: lazy, sharded and sparse ones do not."""
    return impediment(tensor) is None and tensor.numel() > 0


def _place(tensor: torch.Tensor) -> _Place:
    """Return a key for the location of a tensor's values, which a state dict's tensors share with the model's.

    It includes the strides: a tied ``weight.t()`` begins at the same address as the weight.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device
