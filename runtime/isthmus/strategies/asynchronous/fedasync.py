"""FedAsync: asynchronous aggregation, one update at a time."""

import torch

from ...tensors import State, wide
from ..base import Setup, Strategy, Update, change, narrow


class FedAsync(Strategy):
    """Mixing of clients' weights into the model: x = (1 - a) x + a w, where a is mixing times the staleness discount.

    Xie, Koyejo, Gupta, "Asynchronous Federated Optimization" (2019), algorithm 1. As in the paper, numbers of
    examples do not count, and w are the client's weights, from whichever model it started. Several updates of one round
    are mixed in one after the other.
    """

    rebases = False

    def __init__(self, setup: Setup) -> None:
        self._mixing = setup.parameters["mixing"]
        self._model: State = {}
        self._mixed: State = {}

    def begin(self, model: State) -> None:
        self._model = model
        self._mixed = {
            name: tensor.to(wide(tensor.dtype), copy=True)
            if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=wide(tensor.dtype))  # mixes changes
            for name, tensor in model.items()
        }  # fmt: skip

    def accept(self, update: Update) -> None:
        share = self._mixing * update.discount
        for name, mixed in self._mixed.items():
            new, old = update.tensors[name], self._model[name]
            new = new.to(mixed.dtype) if old.is_floating_point() else change(new, old, mixed.dtype)
            # Computed from the nearer end: a share of 1 gives exactly the update, and equal values are preserved.
            if share > 0.5:
                torch.sub(new, new - mixed, alpha=1 - share, out=mixed)
            else:
                mixed.sub_(mixed - new, alpha=share)

    def finish(self) -> State:
        return {name: narrow(self._mixed.pop(name), old) for name, old in self._model.items()}
