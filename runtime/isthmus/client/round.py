"""One round of training, as the script sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakSet

import torch

from ..metric_names import problem_with
from .corrections.base import Correction
from .corrections.optimizers import is_optimizer
from .errors import ScriptError
from .script_values import as_count, as_number, shown

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


@dataclass
class Round:
    """One round of training, as the script sees it."""

    number: int
    """From 1."""
    config: dict[str, str]
    """The manifest's task.config, as it stands in this round."""
    _correction: Correction = field(default_factory=Correction)
    _finish: "Callable[[int, dict[str, float]], Callable[[], object]] | None" = None
    """Makes the update of a number of examples and metrics; returns what hands it in."""
    _told_to_stop: Callable[[], bool] = bool
    _submitted: bool = False
    _wrapped: "WeakSet[torch.optim.Optimizer]" = field(default_factory=WeakSet)

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Adds the correction that the job's strategy asks for (FedProx, SCAFFOLD, FedDyn); returns the same optimizer.

        To be called with each fresh optimizer, before its first step of the round. Again: nothing happens. One around
        another (of Accelerate or Opacus, Lookahead) is corrected in the steps of the one inside.
        Raises ``ValueError`` for an optimizer whose steps cannot be corrected.
        """
        if not is_optimizer(optimizer):
            raise ScriptError(f"rnd.wrap() takes an optimizer, not {shown(optimizer)}")
        if optimizer not in self._wrapped:
            self._wrapped.add(optimizer)
            self._correction.attach(optimizer)
        return optimizer

    @property
    def should_stop(self) -> bool:
        """True if the scheduler asked this process to end: submit what there is, with the true number of examples.

        With torch.distributed: whether it asked any rank to. Every rank gets the same answer, and so every rank must
        ask equally often in a round: each waits for the others. Raises :class:`FederationError` where one does not.
        """
        return self._told_to_stop()

    @property
    def submitted(self) -> bool:
        """True if :meth:`submit` has been called."""
        return self._submitted

    def submit(self, *, num_examples: int, **metrics: float) -> None:
        """Hands the model's present weights in; returns once the aggregator has answered.

        ``num_examples`` is the update's weight; ``metrics`` (loss, accuracy, ...) are averaged over
        the clients with it. With torch.distributed every rank calls it, and what rank 0 says counts: the number of
        examples is that of all ranks together.
        Raises ``ValueError`` for a count that is no whole number of at least 1, a metric that is no number, and names
        that cannot be reported (more than 256, longer than 128 characters, or not printable), and where the strategy
        needs to know more, or has not corrected all steps: it may then be called again; and ``RuntimeError`` if called
        twice in a round.
        """
        if self._submitted:
            raise ScriptError(
                f"round {self.number}: submit() was called twice; each round has its own rnd, and a trainer with a"
                " FederatedCallback of its own"
            )
        count = as_count("num_examples", num_examples)
        numbers = {name: as_number(name, value) for name, value in metrics.items()}
        if (problem := problem_with(numbers)) is not None:
            raise ScriptError(problem)
        hand_in = None if self._finish is None else self._finish(count, numbers)
        self._submitted = True
        if hand_in is not None:
            hand_in()
