"""FedDyn: dynamic regularisation, server side."""

from ...tensors import State, group, ungroup
from ..base import Setup
from .changes import ChangeRule, zeros_like


class FedDyn(ChangeRule):
    """Rule h = h - alpha (updates / clients) mean change; the model is the clients' mean minus h / alpha.

    Acar et al., "Federated Learning Based on Dynamic Regularization" (2021), algorithm 1. The mean is weighted by
    examples, which equals the paper's for clients of equal size. For the client side see
    ``client/corrections/feddyn.py``.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._alpha = setup.parameters["alpha"]
        self._h: State = {}

    def begin(self, model: State) -> None:
        super().begin(model)
        if self._h.keys() != model.keys():
            self._h = zeros_like(model)

    def finish(self) -> State:
        share = min(self._updates / self._setup.clients, 1.0)
        for name, h in self._h.items():
            if self.is_trained(name):
                h.add_(self._means[name].value, alpha=self._alpha * share)
        return self.moved(lambda name, mean: mean.add_(self._h[name], alpha=1 / self._alpha))

    def state(self) -> State:
        return group("FedDyn.h", self._h)

    def load_state(self, state: State) -> None:
        self._h = ungroup("FedDyn.h", state)
