"""Mutable state of a job's training, shared by the aggregator's parts. Event loop only."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus_contracts.pb import federation_pb2 as pb

from ...strategies import StrategyError
from ...tensors import State
from ...views import View
from ..clients.initialization import Initialization
from ..model.global_model import GlobalModel
from ..storage.safetensors_file import SMALL_BYTES
from .metrics_by_round import WeightedMeans
from .notifier import Notifier
from .round_decision import RoundState, UpdateKey
from .round_sums import RoundSums

UPDATE = "update"
"""Key of :attr:`TrainingState.storage_faults` for updates that a strategy keeps on disk."""


@dataclass(frozen=True)
class Contribution:
    """One counted update, apart from its tensors."""

    examples: int
    metrics: Mapping[str, float]
    """Training metrics, as the client measured them."""


@dataclass(kw_only=True)
class ActiveRound(RoundState):
    """The round in progress."""

    base: GlobalModel
    """Model that the round starts from: the newest committed one."""
    closing: bool = False
    """True while the result is computed. No update is accepted any more."""
    contributions: dict[UpdateKey, Contribution] = field(default_factory=dict)
    """One entry for each update that counts, in the order of arrival."""
    sums: RoundSums | None = None
    """The opened sum of secure aggregation, which hides single contributions; ``None`` without it."""

    def restart(self) -> None:
        """Forget the updates that count, since a new sum begins."""
        self.accepted.clear()
        self.reports.clear()
        self.contributions.clear()

    @property
    def examples(self) -> int:
        """Number of examples in all counted updates."""
        return sum(contribution.examples for contribution in self.contributions.values())

    def training_means(self, *, robust: bool) -> WeightedMeans:
        """Return the clients' training metrics; of a client with several updates, the newest counts."""
        means = WeightedMeans(robust)
        for (client, _), contribution in self.contributions.items():
            means.add(client, contribution.examples, contribution.metrics)
        return means


@dataclass
class TrainingState:
    """State of one job."""

    phase: pb.FederationStatus.Phase.ValueType = pb.FederationStatus.WAITING
    waiting: str = ""
    """Which clients or updates are missing, in one line; empty if none are."""
    initial_fault: str = ""
    """Why the newest initial weights were refused, in one line."""
    storage_faults: dict[str, str] = field(default_factory=dict)
    """Failed writes that are retried: one line for each kind of data. Each writer removes its own entry."""
    warnings: list[str] = field(default_factory=list)
    """Problems that did not stop training, in one line each."""
    started: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    model: GlobalModel | None = None
    """The newest committed model."""
    round: ActiveRound | None = None
    """``None`` between rounds."""
    round_started: float = 0.0
    """Start of the newest round, in seconds since the epoch."""
    awaited: int | None = 0
    """Number of clients that must be connected before the first round of this process; ``None`` after it began."""
    initialization: Initialization = field(default_factory=Initialization)
    """Which client is asked for the initial weights."""
    initial: State | None = None
    """Initial weights that are accepted and not yet committed."""
    resumed: int = 0
    """Round that was in progress when an earlier process ended; 0 if there was none."""
    buffers: frozenset[str] = frozenset()
    """Names of the tensors that no optimizer trains, as reported by the client that sent the initial weights."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that required no gradient when training began, as reported by the same client."""
    views: tuple[View, ...] = ()
    """Names that share memory with one of the model's tensors, as reported by the same client."""
    broken: StrategyError | None = None
    """Failure of the strategy, which ends the job."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while updates are counted, which is not the case between rounds."""
    changes: Notifier = field(default_factory=Notifier)

    @property
    def message(self) -> str:
        """Why training does not advance, in one line; empty if it does."""
        return next(iter(self.storage_faults.values()), "") or self.waiting or self.initial_fault

    @property
    def is_small(self) -> bool:
        """True if the model is so small that handing it to a thread takes longer than the work."""
        return self.model is not None and self.model.size <= SMALL_BYTES

    @property
    def completed(self) -> int:
        """Number of committed rounds."""
        return self.model.round if self.model else 0

    def begin_round(self, current: ActiveRound) -> None:
        """Start a round."""
        self.round, self.round_started = current, time.time()
        self.phase, self.waiting, self.initial_fault = pb.FederationStatus.TRAINING, "", ""
        self.open.set()

    def end_round(self) -> None:
        """End the round in progress, with the messages that concern its updates."""
        self.round, self.waiting = None, ""
        self.storage_faults.pop(UPDATE, None)
