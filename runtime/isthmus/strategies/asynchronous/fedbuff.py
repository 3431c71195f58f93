"""FedBuff: buffered asynchronous aggregation."""

from ...tensors import State
from ..averaging.changes import ChangeRule
from ..base import Setup, Update


class FedBuff(ChangeRule):
    """Step of learningRate times the mean of the buffered changes, each discounted by its staleness.

    Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (2022), algorithm 1. The mean is weighted
    by examples, which equals the paper's for clients of equal size. The divisor does not include the discount, so a
    buffer of stale changes makes a small step. The round ends when the buffer is full (``bufferSize``).
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rate = setup.parameters["learningRate"]
        self._examples = 0

    def begin(self, model: State) -> None:
        super().begin(model)
        self._examples = 0

    def fold(self, update: Update) -> None:
        super().fold(update)
        self._examples += update.num_examples

    def finish(self) -> State:
        rate = self._rate * self._weight / self._examples
        return self.moved(lambda _, mean: mean.mul_(rate))
