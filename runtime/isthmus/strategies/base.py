"""The strategy interface."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..tensors import State

# The largest double that is an int64.
_MOST = 2.0**63 - 1024
# With weights up to here their means, differences and squares stay finite in float32, whatever the strategy. Larger
# ones come from training that has diverged: no update may hold them, and no result does.
GREATEST_WEIGHT = 2.0**60


class StrategyError(Exception):
    """A strategy cannot go on, and neither can the job. ``str()`` says where and why, in one line."""


@dataclass(frozen=True)
class Setup:
    """What a strategy is made from."""

    parameters: Mapping[str, float] = field(default_factory=dict)
    """The manifest's, with the defaults of those that it leaves out."""
    directory: Path | None = None
    """Where large working files may lie; ``None``: in the system's directory for temporary files."""
    clients: int = 1
    """Of the whole job, whether they take part in a round or not."""


@dataclass(frozen=True)
class Update:
    """One client's contribution to a round, checked and complete."""

    client: str
    num_examples: int
    tensors: State
    """The client's trained weights: names, shapes and dtypes as in the global model."""
    buffers: frozenset[str] = frozenset()
    """Which of them no optimizer trains, such as batch-norm statistics: they are averaged, whatever the rule does to
    the others."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """What the strategy asked for in its :attr:`Strategy.scalars`."""
    discount: float = 1.0
    """Above 0, at most 1: by how much the update counts less because it is late."""

    @property
    def weight(self) -> float:
        """Its number of examples, discounted."""
        return self.num_examples * self.discount


class Strategy(ABC):
    """Folds updates into a running result, one at a time, so that memory does not grow with the number of clients.

    One round is ``begin``, then ``accept`` for every update, then ``finish``. The calls come from one thread at a time.
    A class of this kind is made from a :class:`Setup`.
    """

    scalars: tuple[str, ...] = ()
    """Numbers that every update must bring along, each by its name; what clients know how to tell is ``steps``,
    ``travel`` and ``loss``, each under the built-in algorithms that ask for it: a user's own class has none."""
    least, most = 1e-9, 1e9
    """From where to where these numbers may be: wide of what any training makes, and so near each other that their
    ratios, times any weights that are let through, are numbers in single precision."""
    rebases = True
    """Whether the weights of an update from an older global model come as that update's change on top of the present
    one; where not, they come as the client made them. Integers and booleans always come as their change."""
    order_free = False
    """Whether the result is the same, bit for bit, whatever the order of the updates."""

    @abstractmethod
    def begin(self, model: State) -> None:
        """Starts a round from the current global model (not to be changed)."""

    @abstractmethod
    def accept(self, update: Update) -> None:
        """Folds one update in. The update's memory may be reused afterwards."""

    @abstractmethod
    def finish(self) -> State:
        """The next global model. At least one update has been accepted.

        Its tensors may be the strategy's own, which change at the next ``begin``.
        """

    def companion(self) -> State:
        """Tensors that clients may ask for beside the model that the last round made."""
        return {}

    def problem_with(self, scalars: Mapping[str, float]) -> str | None:
        """Return what is wrong with the numbers in an update's header, if anything."""
        for name in self.scalars:
            if name not in scalars:
                return f"{type(self).__name__} needs {name} from every client, and the update has none"
            if not self.least <= scalars[name] <= self.most:  # nor is NaN
                return f"{name} must be from {self.least:g} to {self.most:g}, not {scalars[name]}"
        return None

    def state(self) -> State:
        """Return what the rounds to come need of the past, beside the model: it is written with each checkpoint.

        Called after ``finish``; the tensors may be the strategy's own.
        """
        return {}

    def load_state(self, state: State) -> None:  # noqa: B027 - most rules remember nothing
        """Takes up the state of the newest checkpoint, before the first ``begin`` of a restarted aggregator.

        The state is empty, or another rule's, where the job has changed its strategy meanwhile: then this one starts
        afresh.
        """


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return what to sum in: never narrower than the tensors themselves, and at least single precision."""
    return torch.float32 if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float64


def change(new: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By how much ``old`` became ``new``, in the given precision.

    Integers and booleans are subtracted as int64: what has not changed is 0 exactly, however large it is.
    """
    if old.dtype.is_floating_point:
        return new.to(dtype) - old.to(dtype)
    return (new.to(torch.int64) - old.to(torch.int64)).to(dtype)


def narrow(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A rule's result in the dtype of the model's tensor ``old``.

    Of floating-point tensors ``value`` is the result itself, which is brought within what updates may hold: a model
    beyond that would be one from which no client could hand in. Of integers and booleans ``value`` is by how much they
    move, which is rounded to whole numbers; a double cannot hold the integers themselves beyond 2^53. Used up.
    """
    if old.dtype.is_floating_point:
        most = min(GREATEST_WEIGHT, torch.finfo(old.dtype).max)
        return value.clamp_(-most, most).to(old.dtype)
    if value.dtype != torch.int64:
        value = value.round_().clamp_(-(2.0**63), _MOST).to(torch.int64)
    return value.add_(old).to(old.dtype)
