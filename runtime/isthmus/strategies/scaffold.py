"""Stochastic controlled averaging, the server's part."""

from ..tensors import State, group, ungroup
from .base import Setup, Update
from .changes import UNIT, ChangeRule, zeros_like


class Scaffold(ChangeRule):
    """Keeps the control variate c, which travels with the model; the model moves by learningRate times the mean change.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (2020), algorithm 1 with
    option II: a client's control variate changes by -c - change / (steps * learning rate). So the server works it out
    from the update itself and one scalar, ``travel`` (the sum of the client's learning rates over its steps), and
    nothing but the model's own tensors is uploaded. Means are weighted by examples, which for clients of one size is
    the paper's. The clients' part is in ``client/scaffold.py``.
    """

    scalars = ("travel",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rate = setup.parameters["learningRate"]
        self._control: State = {}
        self._slopes: State = {}

    def begin(self, model: State) -> None:
        super().begin(model)
        if self._control.keys() != model.keys():
            self._control = zeros_like(model, {})
        self._slopes = zeros_like(model, self._slopes)

    def fold(self, update: Update) -> None:
        for name, total in self._sums.items():
            for part, change in self.changes(update, name):
                total.view(-1)[part].add_(change, alpha=update.weight)
                if self.is_trained(name):
                    slope = update.weight / update.scalars["travel"] * UNIT
                    self._slopes[name].view(-1)[part].add_(change, alpha=slope)

    def finish(self) -> State:
        share = min(self._updates / self._setup.clients, 1.0)
        for name, control in self._control.items():
            if self.is_trained(name):
                control.mul_(1 - share).sub_(self._slopes[name], alpha=share / self._weight / UNIT)
        return self.moved(lambda name, total: total.mul(self._rate / self._weight))

    def companion(self) -> State:
        return self._control

    def state(self) -> State:
        return group("SCAFFOLD.c", self._control)

    def load_state(self, state: State) -> None:
        self._control = ungroup("SCAFFOLD.c", state)
