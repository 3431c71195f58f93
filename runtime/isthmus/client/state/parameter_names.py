"""Which tensors of a model's state an optimizer trains, and what they are called."""

from collections.abc import Iterable, Mapping
from typing import Self

import torch

from ...tensors import impediment
from ...views import View
from .wrappers import plain_names

_Place = tuple[int, torch.Size, tuple[int, ...], torch.device]


class Names:
    """Finds the name, in the state that travels, of a parameter that an optimizer holds.

    A module's parameters are known as objects: their values move, to a GPU say, after the round has begun. Of a model
    that is no module only the place of the values is known.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], places: Mapping[_Place, str] | None = None,
        views: Iterable[View] = (), wholes: Mapping[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """``views``: of the parameters; ``wholes``: the tensors that they are views of."""
        self._parameters = dict(parameters)  # holds them, so that no other object gets their ids
        self._by_object = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        self._places = places
        self._views = {view.name: view for view in views}
        self._wholes = dict(wholes or {})

    @classmethod
    def of(cls, model: object, live: Mapping[str, torch.Tensor], views: Iterable[View] = ()) -> Self:
        """Those of a model's trained parameters among ``live``, which has all their names; of tied ones, the first."""
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
        """The name of the tensor that travels for a parameter; ``None`` where none does, or it is not the model's."""
        name = self._own_name(parameter)
        return self._views[name].of if name in self._views else name

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """The tensor that travels for a parameter: the parameter itself, unless it is a part of that."""
        view = self._views.get(self._own_name(parameter) or "")
        return parameter if view is None or self._is_all(view, parameter) else self._wholes[view.of]

    def part(self, parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return what belongs to the parameter of values for all of the tensor that travels for it."""
        view = self._views.get(self._own_name(parameter) or "")
        return values if view is None or self._is_all(view, parameter) else view.within(values)

    def leave_out(self, parameter: torch.Tensor) -> bool:
        """Return whether it is certain that the parameter does not travel."""
        return self._places is None and id(parameter) not in self._by_object

    def _own_name(self, parameter: torch.Tensor) -> str | None:
        if self._places is not None:
            return self._places.get(_place(parameter)) if has_place(parameter) else None
        return self._by_object.get(id(parameter))

    def _is_all(self, view: View, parameter: torch.Tensor) -> bool:
        """Return whether a view has all values, in the same shape."""
        whole = self._wholes[view.of]
        return whole.shape == parameter.shape and whole.stride() == parameter.stride()


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return a module's parameters by the names that they have without wrappers: several where they are tied."""
    named = dict(model.named_parameters(remove_duplicate=False))
    names = plain_names(model, list(named))
    return {names[name]: parameter for name, parameter in named.items()}


def trained_of(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's parameters, by the names of their values in its state: several names where they are tied.

    The names tell, also where ``state_dict()`` returns copies (on the CPU, say). Where it renames, the place does.
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
    """The names in a model's state that are no parameters: batch-norm statistics, counters.

    Of a model that is no ``torch.nn.Module``, and has no ``parameters()``, nothing is known: everything may be trained.
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
    """The names in a module's state of parameters that require no gradient, and have none.

    Some scripts (of GANs, say) switch ``requires_grad`` off and on again; what they train has a gradient all the same.
    """
    if not isinstance(model, torch.nn.Module):
        return []
    trained = trained_of(model, state)
    return [name for name, parameter in trained.items() if not parameter.requires_grad and parameter.grad is None]


def has_place(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has values of its own in one piece of memory: lazy, sharded and sparse ones have not."""
    return impediment(tensor) is None and tensor.numel() > 0


def _place(tensor: torch.Tensor) -> _Place:
    """Return where a tensor's values are. A state dict's tensors are others than the model's, but in the same place.

    A view is told from what it is a view of: a tied ``weight.t()`` begins where the weight does.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device
