"""One round of training, as the script sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakSet

import torch

from ..metricnames import problem_with
from .correction import Correction
from .numbers import as_count, as_number

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


@dataclass
class Round:
    """One round of training, as the script sees it."""

    number: int
    """From 1."""
    config: dict[str, str]
    """The manifest's task.config, as it stands in this round."""
    _correction: Correction = field(default_factory=Correction)
    _hand_in: "Callable[[int, dict[str, float]], None] | None" = None
    _told_to_stop: Callable[[], bool] = bool
    _submitted: bool = False
    _wrapped: "WeakSet[torch.optim.Optimizer]" = field(default_factory=WeakSet)

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Adds the correction that the job's strategy asks for (FedProx, SCAFFOLD, FedDyn); returns the same optimizer.

        To be called with a fresh optimizer, before the first step of the round. Again: nothing happens.
        """
        if optimizer not in self._wrapped:
            self._wrapped.add(optimizer)
            self._correction.attach(optimizer)
        return optimizer

    @property
    def should_stop(self) -> bool:
        """Whether the scheduler asked this process to end: submit what there is, with the true number of examples.

        With torch.distributed: whether it asked any rank to. Every rank gets the same answer, and so every rank must
        ask equally often in a round: each waits for the others. Raises :class:`FederationError` where one does not.
        """
        return self._told_to_stop()

    @property
    def submitted(self) -> bool:
        """Whether :meth:`submit` has been called."""
        return self._submitted

    def submit(self, *, num_examples: int, **metrics: float) -> None:
        """Hands the model's present weights in; returns once the aggregator has answered.

        ``num_examples`` is the update's weight; ``metrics`` (loss, accuracy, ...) are averaged over
        the clients with it. With torch.distributed every rank calls it, and what rank 0 says counts: the number of
        examples is that of all ranks together.
        Raises ``ValueError`` for a count that is no whole number of at least 1, a metric that is no number, and names
        that cannot be reported (more than 256, longer than 128 characters, or not printable): it may then be called
        again; and ``RuntimeError`` if called twice in a round.
        """
        if self._submitted:
            raise RuntimeError(f"round {self.number}: submit() was called twice")
        count = as_count("num_examples", num_examples)
        numbers = {name: as_number(name, value) for name, value in metrics.items()}
        if (problem := problem_with(numbers)) is not None:
            raise ValueError(problem)
        self._submitted = True
        if self._hand_in is not None:
            self._hand_in(count, numbers)
