"""Which tensors of a model's state an optimizer trains, and what they are called."""

from collections.abc import Mapping
from typing import Self

import torch


class Names:
    """Finds the name, in the state that travels, of a parameter that an optimizer holds.

    A module's parameters are known as objects: their values move, to a GPU say, after the round has begun. Of a model
    that is no module only the place of the values is known.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], places: Mapping[int, str] | None = None) -> None:
        self._parameters = dict(parameters)  # holds them, so that no other object gets their ids
        self._by_object = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        self._places = places

    @classmethod
    def of(cls, model: object, live: Mapping[str, torch.Tensor]) -> Self:
        """Those of a model's trained parameters among ``live``; of tied ones, the first name."""
        buffers = set(buffers_of(model, live))
        places: dict[int, str] = {}
        for name, tensor in live.items():
            if name not in buffers and tensor.numel() and tensor.is_floating_point():
                places.setdefault(tensor.data_ptr(), name)
        if not isinstance(model, torch.nn.Module):
            return cls({}, places)
        return cls({places[p.data_ptr()]: p for p in model.parameters() if p.data_ptr() in places})

    def find(self, parameter: torch.Tensor) -> str | None:
        """The parameter's name; ``None`` for one that does not travel, or that is not the model's."""
        if self._places is not None:
            return self._places.get(parameter.data_ptr())
        return self._by_object.get(id(parameter))

    def leave_out(self, parameter: torch.Tensor) -> bool:
        """Whether it is certain that the parameter does not travel."""
        return self._places is None and id(parameter) not in self._by_object


def buffers_of(model: object, state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names in a model's state that are no parameters: batch-norm statistics, counters.

    Of a model that is no ``torch.nn.Module``, and has no ``parameters()``, nothing is known: everything may be trained.
    """
    parameters = getattr(model, "parameters", None)
    if not callable(parameters):
        return []
    trained = {_place(parameter) for parameter in parameters()}
    return [name for name, tensor in state.items() if _place(tensor) not in trained]


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, torch.device]:
    """Where a tensor's values are. A state dict's tensors are others than the model's, but in the same place."""
    return tensor.data_ptr(), tensor.shape, tensor.device
