"""Federated averaging."""

import torch

from ..tensors import State
from .base import Setup, Strategy, Update, narrow
from .changes import changes, sums_like


class FedAvg(Strategy):
    """Mean of the clients' weights, weighted by their numbers of examples.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), algorithm 1.
    Integer and boolean buffers (such as batch-norm counters) move by the mean of their changes, rounded.
    """

    def __init__(self, setup: Setup) -> None:
        self._model: State = {}
        self._sums: State = {}
        self._weight = 0.0

    def begin(self, model: State) -> None:
        self._model = model
        self._weight = 0.0
        self._sums = sums_like(model, self._sums)

    def accept(self, update: Update) -> None:
        # The first update takes the place of what the sums' memory holds: clients do not wait until it has been zeroed.
        first = not self._weight
        self._weight += update.weight
        for name, total in self._sums.items():
            tensor = update.tensors[name]
            if first and tensor.dtype == total.dtype:
                torch.mul(tensor, update.weight, out=total)
                continue
            if first:
                total.zero_()
            if tensor.is_floating_point():
                total.add_(tensor, alpha=update.weight)
                continue
            for part, moved in changes(tensor, self._model[name], total.dtype):
                total.view(-1)[part].add_(moved, alpha=update.weight)

    def finish(self) -> State:
        # In place: it is the new model until the next round begins.
        return {name: narrow(self._sums[name].div_(self._weight), old) for name, old in self._model.items()}

    def _mean(self, name: str) -> torch.Tensor:
        """A tensor's mean over the clients so far, or that of its change (see :func:`narrow`), as it was summed."""
        return self._sums[name].div(self._weight)
