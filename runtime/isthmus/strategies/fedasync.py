"""Asynchronous aggregation, one update at a time."""

from ..tensors import State
from .base import Setup, Strategy, Update, narrow, wide


class FedAsync(Strategy):
    """Mixes each client's weights into the model: x = (1 - a) x + a w, with a = mixing times the staleness discount.

    Xie, Koyejo, Gupta, "Asynchronous Federated Optimization" (2019), algorithm 1. As in the paper, examples do not
    count, and w is what the client trained, from whichever model it began. Where several updates meet in one round
    they are mixed in one after the other.
    """

    rebases = False

    def __init__(self, setup: Setup) -> None:
        self._mixing = setup.parameters["mixing"]
        self._model: State = {}
        self._mixed: State = {}

    def begin(self, model: State) -> None:
        self._model = model
        self._mixed = {name: tensor.to(wide(tensor.dtype), copy=True) for name, tensor in model.items()}

    def accept(self, update: Update) -> None:
        share = self._mixing * update.discount
        for name, mixed in self._mixed.items():
            mixed.lerp_(update.tensors[name].to(mixed.dtype), share)

    def finish(self) -> State:
        return {name: narrow(self._mixed.pop(name), old.dtype) for name, old in self._model.items()}
