"""SCAFFOLD: stochastic controlled averaging, server side."""

from collections.abc import Iterator

import torch

from ...tensors import State, group, ungroup
from ..base import Setup, Update
from .averages import Mean, means_of, parts
from .changes import ChangeRule, zeros_like


class Scaffold(ChangeRule):
    """Rule with a control variate c, sent with the model, which moves by learningRate times the mean change.

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (2020), algorithm 1 with
    option II: a client's control variate changes by -c - change / (steps * learning rate). So the server computes it
    from the update itself and one scalar, ``travel`` (the sum of the client's learning rates over its steps), and
    clients upload only the model's own tensors. Means are weighted by examples, which equals the paper's for clients of
    equal size. The client side is in ``client/corrections/scaffold.py``.
    """

    scalars = ("travel",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rate = setup.parameters["learningRate"]
        self._control: State = {}
        self._slopes: dict[str, Mean] = {}
        self._normalised = 0.0

    def begin(self, model: State) -> None:
        super().begin(model)
        if self._control.keys() != model.keys():
            self._control = zeros_like(model)
        self._slopes = means_of(model, self._slopes)
        self._normalised = 0.0

    def release(self) -> None:
        super().release()
        self._slopes = {}

    def fold(self, update: Update) -> None:
        super().fold(update)
        slope = update.weight if update.slopes else update.weight / update.scalars["travel"]
        for name, mean in self._slopes.items():
            if self.is_trained(name):
                mean.add(self._gradients_over_travel(update, name), slope)
        self._normalised += slope

    def _gradients_over_travel(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the negated change of a tensor, up to the factor that :meth:`fold` puts into its weight."""
        if not update.slopes:
            yield from self.gradients(update, name)
            return
        mean = update.slopes[name].reshape(-1)
        for part in parts(len(mean)):
            yield part, mean[part].neg()

    def finish(self) -> State:
        share = min(self._updates / self._setup.clients, 1.0)
        for name, control in self._control.items():
            if self.is_trained(name):
                control.mul_(1 - share).add_(self._slopes[name].value, alpha=share * self._normalised / self._weight)
        return self.moved(lambda _, mean: mean.mul_(self._rate))

    def companion(self) -> State:
        return self._control

    def state(self) -> State:
        return group("SCAFFOLD.c", self._control)

    def load_state(self, state: State) -> None:
        self._control = ungroup("SCAFFOLD.c", state)
