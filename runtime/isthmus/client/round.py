"""A round of training, as the script sees it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakSet

import torch

from isthmus_contracts.pb import federation_pb2 as pb

from ..metric_names import problem_with
from .corrections.base import Correction
from .corrections.optimizers import is_optimizer
from .errors import FederationError, ScriptError
from .script_values import as_count, as_number, shown

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
Finish = Callable[[int, dict[str, float]], Callable[[], object]]


@dataclass
class Round:
    """A round of training, as the script sees it."""

    number: int
    """From 1."""
    config: dict[str, str]
    """The manifest's task.config, as it applies to this round."""
    _correction: Correction = field(default_factory=Correction)
    _finish: Finish | None = None
    """Makes an update of a number of examples and metrics; returns the function that submits it."""
    _told_to_stop: Callable[[], bool] = lambda: False
    _submitted: bool = False
    _wrapped: "WeakSet[torch.optim.Optimizer]" = field(default_factory=WeakSet)

    def wrap(self, optimizer: Optimizer) -> Optimizer:
        """Apply the correction of the job's strategy (FedProx, SCAFFOLD, FedDyn) to an optimizer, and return it.

        Call it for each new optimizer, before its first step of the round; repeated calls have no effect. For an
        optimizer around another one (of Accelerate or Opacus, Lookahead), the steps of the inner one are corrected.
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

        With torch.distributed: true if any rank was asked to end. All ranks get the same answer, so all must read it
        equally often in a round; each waits for the others. Raises :class:`FederationError` if one does not.
        """
        return self._told_to_stop()

    @property
    def submitted(self) -> bool:
        """True if :meth:`submit` has been called."""
        return self._submitted

    def submit(self, *, num_examples: int, **metrics: float) -> None:
        """Submit the model's present weights; return once the aggregator has replied.

        With secure aggregation the weights and numbers are masked, and a metric without a bound in the manifest stays
        here. The call waits for the other clients' keys, which are exchanged during training.

        ``num_examples`` is the update's weight; ``metrics`` (loss, accuracy, ...) are averaged over the clients with
        it. With torch.distributed every rank calls it, and the arguments of rank 0 count: its number of examples is
        that of all ranks together.
        Raises ``ValueError`` if the count is not a whole number of at least 1, if a metric is not a number, if names
        cannot be reported (more than 256, longer than 128 characters, or not printable), and if the strategy needs
        further metrics or has not corrected all steps; it may then be called again. Raises ``RuntimeError`` if called
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
        send = None if self._finish is None else self._finish(count, numbers)
        self._submitted = True
        if send is not None:
            send()


def open_round(
    offer: pb.Offer,
    correction: Correction,
    finish: Finish,
    told_to_stop: Callable[[], bool],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Round]:
    """Yield an offer's round to the script, and close its correction afterwards.

    Then ``check`` is called, which may raise. Raises :class:`FederationError` if the script did not submit.
    """
    rnd = Round(offer.round, dict(offer.config), correction, finish, told_to_stop)
    try:
        yield rnd
    finally:
        correction.close()
    check()
    if not rnd.submitted:
        raise FederationError(f"round {rnd.number} ended without rnd.submit(num_examples=...)")
