"""FedNova: normalised averaging, for clients that take different numbers of steps."""

from ...tensors import State
from ..base import Setup, Update
from .changes import ChangeRule


class FedNova(ChangeRule):
    """Mean of each client's change divided by its number of local steps, times the effective number of steps.

    Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization" (2020), equation
    7: x + (sum_i p_i a_i) sum_i p_i change_i / a_i. a_i, the scalar ``steps`` of an update, is the paper's norm of the
    weights with which the local gradients enter: with momentum a step counts for more than one.
    """

    scalars = ("steps",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._weighted_steps = self._normalised = 0.0

    def begin(self, model: State) -> None:
        super().begin(model)
        self._weighted_steps = self._normalised = 0.0

    def fold(self, update: Update) -> None:
        steps = update.scalars["steps"]
        self.add(update, update.weight / steps)
        self._normalised += update.weight / steps
        self._weighted_steps += update.weight * steps

    def finish(self) -> State:
        effective = self._weighted_steps / self._weight * self._normalised / self._weight
        return self.moved(lambda _, mean: mean.mul_(effective))
