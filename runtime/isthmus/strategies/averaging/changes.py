"""Base class of rules that average the clients' changes instead of their weights."""

from collections.abc import Callable, Iterator

import torch

from ...tensors import State, wide
from ..base import Setup, Update, narrow
from .averages import Averaging, parts


class ChangeRule(Averaging):
    """Mean of the clients' changes of the global model, with a weight of the rule's choice.

    A change has the sign of a gradient: the global weights minus the client's. Tensors that no optimizer trains (the
    statistics of batch-norm layers, counters) are averaged as in FedAvg.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._buffers: frozenset[str] = frozenset()
        self._weight = 0.0
        self._updates = 0

    def begin(self, model: State) -> None:
        super().begin(model)
        self._weight, self._updates = 0.0, 0

    def accept(self, update: Update) -> None:
        if not self._updates:
            self._buffers = update.buffers
        self.fold(update)
        self._weight += update.weight
        self._updates += update.count

    def fold(self, update: Update) -> None:
        """Add an update to the means. By default a change is weighted by its number of examples."""
        self.add(update, update.weight)

    def add(self, update: Update, weight: float) -> None:
        """Add an update to the means, with the given weight for trained tensors."""
        for name, mean in self._means.items():
            mean.add(self.averaged(update, name), weight if self.is_trained(name) else update.weight)

    def averaged(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        return self.gradients(update, name) if self.is_trained(name) else super().averaged(update, name)

    def gradients(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the negated change of a tensor in an update, in the precision of the means, part by part."""
        new, old = update.tensors[name].reshape(-1), self._model[name].reshape(-1)
        dtype = wide(old.dtype)
        for part in parts(len(old)):
            yield part, old[part].to(dtype) - new[part].to(dtype)

    def is_trained(self, name: str) -> bool:
        """Return whether the rule applies to a tensor, according to the buffers of the round's first update."""
        return name not in self._buffers and self._model[name].is_floating_point()

    def moved(self, step: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
        """Return the next model: trained tensors minus ``step(name, mean gradient)``, the others averaged.

        ``step`` may overwrite the mean. A weight that no client moved has gradient 0, and is preserved bit for bit.
        """
        result: State = {}
        for name, old in self._model.items():
            if not self.is_trained(name):
                result[name] = self.mean(name)
                continue
            taken = step(name, self._means[name].value)
            result[name] = narrow(old.to(taken.dtype) - taken, old)
        return result


def zeros_like(model: State) -> State:
    """Return zeros for every tensor of a model, in the precision of its means."""
    return {
        name: torch.zeros_like(tensor, dtype=wide(tensor.dtype), memory_format=torch.contiguous_format)
        for name, tensor in model.items()
    }
