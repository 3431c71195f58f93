"""What the rules share that weight the clients' changes, rather than their weights."""

from collections.abc import Callable, Iterator

import torch

from ..tensors import State
from .base import Setup, Strategy, Update, change, narrow, wide

# Values whose change is worked out at a time: 1 MiB of float32.
_PART = 1 << 18
# Of sums in which a client's own number is a factor: so small that they stay within single precision, whatever number
# and weights of a client are let through. A power of two, which changes no bit of them.
UNIT = 2.0**-32


class ChangeRule(Strategy):
    """Sums each client's change of the global model, with a weight of the rule's choice.

    What no optimizer trains (the statistics of batch-norm layers, counters) is averaged as in FedAvg.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model: State = {}
        self._sums: State = {}
        self._buffers: frozenset[str] = frozenset()
        self._weight = 0.0
        self._updates = 0

    def begin(self, model: State) -> None:
        self._model = model
        self._weight, self._updates = 0.0, 0
        self._sums = zeros_like(model, self._sums)

    def accept(self, update: Update) -> None:
        self._buffers = update.buffers
        self.fold(update)
        self._weight += update.weight
        self._updates += 1

    def fold(self, update: Update) -> None:
        """Adds an update to the sums: each change counts by its number of examples, unless a rule has it otherwise."""
        self.add(update, update.weight)

    def add(self, update: Update, weight: float) -> None:
        """Adds a client's changes to the sums, those of trained tensors with the given weight."""
        for name, total in self._sums.items():
            share = weight if self.is_trained(name) else update.weight
            for part, moved in self.changes(update, name):
                total.view(-1)[part].add_(moved, alpha=share)

    def changes(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """By how much an update moves a tensor, in the precision of the sums, part by part."""
        return changes(update.tensors[name], self._model[name], self._sums[name].dtype)

    def is_trained(self, name: str) -> bool:
        """Whether the rule applies to a tensor, of the clients' kind since the last update."""
        return name not in self._buffers and self._model[name].is_floating_point()

    def moved(self, step: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
        """The next model: each trained tensor moved by ``step(name, sum of changes)``, the others by their mean."""
        result: State = {}
        for name, old in self._model.items():
            total = self._sums[name]
            value = step(name, total) if self.is_trained(name) else total.div(self._weight)
            result[name] = narrow(value + old.to(value.dtype) if old.is_floating_point() else value, old)
        return result


def changes(new: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """By how much ``old`` became ``new``: part by part of their flat values, so that the difference lies in memory that
    the processor has at hand."""
    new, old = new.reshape(-1), old.reshape(-1)
    for start in range(0, len(old), _PART):
        part = slice(start, start + _PART)
        yield part, change(new[part], old[part], dtype)


def zeros_like(model: State, earlier: State) -> State:
    """A sum for every tensor of a model, at zero; in the memory of earlier ones where they fit."""
    sums = sums_like(model, earlier)
    for total in sums.values():
        total.zero_()
    return sums


def sums_like(model: State, earlier: State) -> State:
    """The memory of a sum for every tensor of a model: that of earlier ones where they fit."""
    if earlier.keys() == model.keys():
        return earlier
    return {name: torch.empty_like(tensor, dtype=wide(tensor.dtype)) for name, tensor in model.items()}
