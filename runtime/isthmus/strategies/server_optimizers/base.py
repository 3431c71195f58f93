"""Base classes of rules with an optimizer on the server, which steps along the clients' mean change."""

from abc import abstractmethod

import torch

from ...tensors import State, group, ungroup, wide
from ..averaging.changes import ChangeRule
from ..base import Setup


class ServerOptimizer(ChangeRule):
    """Optimizer that uses the negated mean change of a round as the gradient of the global model.

    Reddi et al., "Adaptive Federated Optimization" (2021), algorithm 1. Tensors that no optimizer trains at
    the clients (the statistics of batch-norm layers, counters) are averaged as in FedAvg: an adaptive step could make
    variances negative.
    """

    slots: tuple[str, ...] = ()
    """Names of the optimizer's state tensors, which it keeps for each trained tensor."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rate = setup.parameters["learningRate"]
        self._memory: dict[str, State] = {slot: {} for slot in self.slots}

    def finish(self) -> State:
        return self.moved(lambda name, mean: self.step(mean, *(self._slot(slot, name) for slot in self.slots)))

    @abstractmethod
    def step(self, gradient: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        """Return the step to subtract from a tensor. Updates ``memory`` in place, and may overwrite ``gradient``."""

    def first(self, slot: str) -> float:
        """Return the initial value of a slot."""
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
    """Algorithm 2 of Reddi et al. (2021), without the second moment, in which its three rules differ.

    m = beta1 m + (1 - beta1) gradient; step = learningRate m / (sqrt(v) + tau); v begins as tau squared. As in the
    paper there is no bias correction in the first rounds.
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
        """Update v in place with the squared gradient, which may be overwritten."""
