"""Fairer averaging: clients that the global model serves badly count for more."""

from ..tensors import State
from .base import Setup, Update
from .changes import ChangeRule

# A loss of exactly zero has no power below one.
_SMALLEST_LOSS = 1e-10


class QFedAvg(ChangeRule):
    """Minimises sum_k p_k F_k^(q+1) / (q+1); q = 0 is FedAvg.

    Li et al., "Fair Resource Allocation in Federated Learning" (2020), algorithm 2, with L = 1 / learningRate. The
    paper draws clients with probability p_k; here they are drawn evenly, and p_k (the share of examples) is a weight.
    F_k, the scalar ``loss`` of an update, is the client's loss at the global model, before training.
    """

    scalars = ("loss",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._q, self._smoothness = setup.parameters["q"], 1 / setup.parameters["learningRate"]
        self._curvature = 0.0

    def begin(self, model: State) -> None:
        super().begin(model)
        self._curvature = 0.0

    def fold(self, update: Update) -> None:
        loss, scale = max(update.scalars["loss"], _SMALLEST_LOSS), self._smoothness
        trained = [name for name in self._sums if self.is_trained(name)]
        changes = (change for name in trained for _, change in self.changes(update, name))
        square = sum(float(change.mul_(scale).square_().sum()) for change in changes)
        power = loss**self._q
        self._curvature += update.weight * (self._q * loss ** (self._q - 1) * square + scale * power)
        self.add(update, update.weight * power * scale)

    def finish(self) -> State:
        return self.moved(lambda name, total: total.div(self._curvature))
