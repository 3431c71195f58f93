"""What the rules share that let an optimizer on the server take the step from the global model to the clients' mean."""

from abc import abstractmethod

import torch

from ...tensors import State, group, ungroup
from ..averaging.changes import ChangeRule
from ..base import Setup, wide


class ServerOptimizer(ChangeRule):
    """Takes the mean change of a round, negated, for a gradient of the global model.

    Reddi et al., "Adaptive Federated Optimization" (2021), algorithm 1. What no optimizer trains at the clients (the
    statistics of batch-norm layers, counters) is averaged as in FedAvg: an adaptive step would carry variances below
    zero.
    """

    slots: tuple[str, ...] = ()
    """The optimizer's memory: so many tensors beside each trained one."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rate = setup.parameters["learningRate"]
        self._memory: dict[str, State] = {slot: {} for slot in self.slots}

    def finish(self) -> State:
        return self.moved(lambda name, mean: self.step(mean, *(self._slot(slot, name) for slot in self.slots)))

    @abstractmethod
    def step(self, gradient: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        """Return the step to subtract from a tensor. Updates the memory in place, and may reuse ``gradient``."""

    def first(self, slot: str) -> float:
        """Return what a slot is filled with before the first round."""
        return 0.0

    def state(self) -> State:
        tensors: State = {}
        for slot in self.slots:
            tensors |= group(f"{type(self).__name__}.{slot}", self._memory[slot])
        return tensors

    def load_state(self, state: State) -> None:
        self._memory = {slot: ungroup(f"{type(self).__name__}.{slot}", state) for slot in self.slots}

    def _slot(self, slot: str, name: str) -> torch.Tensor:
        memory, old = self._memory[slot], self._model[name]
        if name not in memory or memory[name].shape != old.shape:
            memory[name] = torch.full(old.shape, self.first(slot), dtype=wide(old.dtype), device="cpu")
        return memory[name]


class AdaptiveOptimizer(ServerOptimizer):
    """Reddi et al. (2021), algorithm 2, apart from the second moment, in which its three rules differ.

    m = beta1 m + (1 - beta1) gradient; step = learningRate m / (sqrt(v) + tau); v begins as tau squared. As in the
    paper there is no correction of the bias in the first rounds.
    """

    slots = ("m", "v")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._beta1, self._tau = setup.parameters["beta1"], setup.parameters["tau"]

    def first(self, slot: str) -> float:
        return self._tau**2 if slot == "v" else 0.0

    def step(self, gradient: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        m, v = memory
        m.mul_(self._beta1).add_(gradient, alpha=1 - self._beta1)
        self.second_moment(v, gradient.square_())
        torch.sqrt(v, out=gradient)
        return torch.div(m, gradient.add_(self._tau), out=gradient).mul_(self._rate)

    @abstractmethod
    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> None:
        """Brings v up to date, in place, with the squared gradient (which may be reused)."""
