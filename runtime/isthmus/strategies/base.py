"""Interface of strategies."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..tensors import GREATEST_WEIGHT, State

# The largest double that is an int64.
_MOST = 2.0**63 - 1024


class StrategyError(Exception):
    """Failure of a strategy that ends the job. ``str()`` gives the place and the reason, in one line."""


@dataclass(frozen=True)
class Setup:
    """Arguments of a strategy's constructor."""

    parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters in the manifest, completed with defaults."""
    directory: Path | None = None
    """Directory for large working files; ``None``: the system's directory for temporary files."""
    clients: int = 1
    """Number of clients of the whole job, whether they take part in a round or not."""


@dataclass(frozen=True)
class Update:
    """Validated, complete contribution of one client to a round."""

    client: str
    num_examples: int
    tensors: State
    """The client's trained weights: names, shapes and dtypes as in the global model."""
    buffers: frozenset[str] = frozenset()
    """Names of tensors that no optimizer trains, such as batch-norm statistics. They are averaged under every rule."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the strategy requires in its :attr:`Strategy.scalars`."""
    discount: float = 1.0
    """Factor above 0 and at most 1 by which a late update counts less."""
    count: int = 1
    """Number of clients whose weighted mean this update is: more than 1 under secure aggregation only."""
    slopes: State = field(default_factory=dict)
    """Weighted mean of the clients' changes, each divided by the client's ``travel``: for SCAFFOLD
    under secure aggregation only."""

    @property
    def weight(self) -> float:
        """Number of examples times the discount."""
        return self.num_examples * self.discount


class Strategy(ABC):
    """Rule that folds updates into a running result one at a time, so that memory does not grow with their number.

    A round is one call of ``begin``, one of ``accept`` per update, and one of ``finish``, by one thread at a time.
    The constructor of a strategy takes a :class:`Setup`.
    """

    scalars: tuple[str, ...] = ()
    """Names of the numbers that every update must contain. Clients report ``steps``, ``travel`` and ``loss``, each only
    for the built-in algorithms that require it: a custom class cannot require any."""
    least, most = 1e-9, 1e9
    """Range of these numbers: wider than any training needs, but so narrow that their ratios, times any accepted
    weights, stay finite in single precision."""
    rebases = True
    """True if the weights of an update from an older global model are rebased: its change is added to the present
    model. If false, they are passed as the client made them. Integers and booleans are always rebased."""
    order_free = False
    """True if the result is bit for bit independent of the order of the updates."""

    @abstractmethod
    def begin(self, model: State) -> None:
        """Start a round from the current global model, which must not be changed."""

    @abstractmethod
    def accept(self, update: Update) -> None:
        """Fold one update in. The update's memory may be reused afterwards."""

    @abstractmethod
    def finish(self) -> State:
        """Return the next global model. At least one update has been accepted.

        Its tensors may belong to the strategy, which changes them at the next ``begin``.
        """

    def release(self) -> None:  # noqa: B027 - most wrappers have nothing to free
        """Free the memory of the last result, which is no longer needed, before a round that begins later."""

    def companion(self) -> State:
        """Return the auxiliary tensors that clients may request together with the model of the last round."""
        return {}

    def problem_with(self, scalars: Mapping[str, float]) -> str | None:
        """Return the problem with the numbers in an update's header, or ``None``."""
        for name in self.scalars:
            if name not in scalars:
                return f"{type(self).__name__} needs {name} from every client, and the update has none"
            if not self.least <= scalars[name] <= self.most:  # also rejects NaN: comparisons with it are false
                return f"{name} must be from {self.least:g} to {self.most:g}, not {scalars[name]}"
        return None

    def state(self) -> State:
        """Return the state, beside the model, that later rounds need. It is written with each checkpoint.

        Called after ``finish``; the tensors may belong to the strategy.
        """
        return {}

    def load_state(self, state: State) -> None:  # noqa: B027 - most rules have no state
        """Load the state of the newest checkpoint, before the first ``begin`` of a restarted aggregator.

        If the job's strategy has been changed since, the state is empty or that of another rule; a strategy must then
        start without state.
        """


def change(new: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the change from ``old`` to ``new``, in the given precision.

    Integers and booleans are subtracted as int64, so that an unchanged value gives exactly 0, however large it is.
    """
    if old.dtype.is_floating_point:
        return new.to(dtype) - old.to(dtype)
    return (new.to(torch.int64) - old.to(torch.int64)).to(dtype)


def narrow(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Convert a rule's result to the dtype of the model's tensor ``old``.

    For floating-point tensors ``value`` is the result itself. It is clamped to the bound on updates, since every update
    from a larger model would be refused. For integers and booleans ``value`` is the change, which is rounded to whole
    numbers; a double cannot hold the integers themselves above 2^53. ``value`` is overwritten.
    """
    if old.dtype.is_floating_point:
        most = min(GREATEST_WEIGHT, torch.finfo(old.dtype).max)
        return value.clamp_(-most, most).to(old.dtype)
    if value.dtype != torch.int64:
        value = value.round_().clamp_(-(2.0**63), _MOST).to(torch.int64)
    return value.add_(old).to(old.dtype)
