"""What the rules share that weight the clients' changes, rather than their weights."""

from collections.abc import Callable, Iterator

import torch

from ...tensors import State
from ..base import Setup, Update, narrow, wide
from .averages import Averaging, parts


class ChangeRule(Averaging):
    """Averages each client's change of the global model, with a weight of the rule's choice.

    A change is taken as a gradient is: the global weights minus the client's. What no optimizer trains (the statistics
    of batch-norm layers, counters) is averaged as in FedAvg.
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
        self._updates += 1

    def fold(self, update: Update) -> None:
        """Takes an update into the means: a change counts by its number of examples, unless a rule has it otherwise."""
        self.add(update, update.weight)

    def add(self, update: Update, weight: float) -> None:
        """Takes an update into the means, what is trained with the given weight."""
        for name, mean in self._means.items():
            mean.add(self.averaged(update, name), weight if self.is_trained(name) else update.weight)

    def averaged(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        return self.gradients(update, name) if self.is_trained(name) else super().averaged(update, name)

    def gradients(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """How far an update moves a tensor, negated, in the precision of the means; part by part."""
        new, old = update.tensors[name].reshape(-1), self._model[name].reshape(-1)
        dtype = wide(old.dtype)
        for part in parts(len(old)):
            yield part, old[part].to(dtype) - new[part].to(dtype)

    def is_trained(self, name: str) -> bool:
        """Return whether the rule applies to a tensor, of the clients' kind since the round's first update."""
        return name not in self._buffers and self._model[name].is_floating_point()

    def moved(self, step: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
        """The next model: from each trained tensor ``step(name, mean gradient)`` is taken, the others are averaged.

        The mean may be used up. Where nobody moved a weight its gradient is 0, and it comes back bit for bit.
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
    """A tensor of zeros for every floating-point tensor of a model, in the precision of its means."""
    return {
        name: torch.zeros_like(tensor, dtype=wide(tensor.dtype), memory_format=torch.contiguous_format)
        for name, tensor in model.items()
    }
