"""q-FedAvg: clients for which the global model has a higher loss get more weight."""

import math
import sys
from collections.abc import Mapping

from ...tensors import State
from ..base import Setup, Update
from .changes import ChangeRule

# Lower bound of the loss in powers, because 0 cannot be raised to a negative power.
_SMALLEST_LOSS = 1e-10
# Maximum excess of a power over the scale of the powers, as a binary logarithm, before the scale is changed.
_HEADROOM = 32
# Scales changes so that their squares stay within single precision. A power of two.
_SHRINK = 2.0**-20


class QFedAvg(ChangeRule):
    """Minimisation of sum_k p_k F_k^(q+1) / (q+1); q = 0 is FedAvg.

    Li et al., "Fair Resource Allocation in Federated Learning" (2020), algorithm 2, with L = 1 / learningRate. The
    paper samples clients with probability p_k; here sampling is uniform, and p_k (the share of examples) is a weight.
    F_k, the scalar ``loss`` of an update, is the client's loss at the global model, before training.

    The numerator and the denominator of a step are sums of powers of losses, which may be too large or too small for
    any precision. Since only their quotient counts, both are divided by a power close to the largest so far.
    """

    scalars = ("loss",)
    least, most = 0.0, sys.float_info.max

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._q, self._smoothness = setup.parameters["q"], 1 / setup.parameters["learningRate"]
        self._shares = self._curvature = 0.0
        self._height = 0.0
        """Binary logarithm of the divisor of the powers."""

    def begin(self, model: State) -> None:
        super().begin(model)
        self._shares = self._curvature = 0.0

    def fold(self, update: Update) -> None:
        loss = max(update.scalars["loss"], _SMALLEST_LOSS)
        trained = [name for name in self._means if self.is_trained(name)]
        changes = (change for name in trained for _, change in self.gradients(update, name))
        square = sum(float(change.mul_(_SHRINK).square_().sum()) for change in changes) / _SHRINK**2
        share = update.weight * self._power(self._q * math.log2(loss))
        self.add(update, share)
        self._shares += share
        self._curvature += share * (1 + self._q * self._smoothness * square / loss)

    def finish(self) -> State:
        rate = self._shares / self._curvature
        return self.moved(lambda _, mean: mean.mul_(rate))

    def problem_with(self, scalars: Mapping[str, float]) -> str | None:
        if scalars.get("loss", 0.0) < 0:
            return f"QFedAvg takes powers of losses, which must be at least 0, not {scalars['loss']}"
        return super().problem_with(scalars)

    def _power(self, height: float) -> float:
        """Return 2 to the ``height``, on the scale of the weights."""
        if not self._updates:
            self._height = height
        elif height > self._height + _HEADROOM:
            smaller = 2.0 ** (self._height - height)
            for name, mean in self._means.items():
                if self.is_trained(name):
                    mean.scale(smaller)
            self._shares *= smaller
            self._curvature *= smaller
            self._height = height
        return float(2.0 ** (height - self._height))
