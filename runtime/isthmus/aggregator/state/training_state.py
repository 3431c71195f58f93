"""Where a job's training stands: what the parts of the aggregator share."""

import asyncio
import time
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
from .round_decision import RoundState


@dataclass
class TrainingState:
    """Changed on the event loop only."""

    phase: pb.FederationStatus.Phase.ValueType = pb.FederationStatus.WAITING
    message: str = ""
    """Why it waits; empty when all is well."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong without keeping training up, in a line each."""
    started: float = field(default_factory=time.time)
    model: GlobalModel | None = None
    """The newest committed one."""
    round: RoundState | None = None
    """The one in progress."""
    round_started: float = 0.0
    """Seconds since the epoch."""
    closing: bool = False
    """The round's result is being computed: nothing is accepted any more."""
    means: WeightedMeans = field(default_factory=WeightedMeans)
    """What the clients measured while they trained for the round in progress."""
    examples: int = 0
    """Of the updates of the round in progress."""
    awaited: int | None = 0
    """How many clients are to be there before the first round of this process; None once they were."""
    initialization: Initialization = field(default_factory=Initialization)
    """Who is asked for the first weights."""
    initial: State | None = None
    """These weights."""
    resumed: int = 0
    """The round that was in progress when an earlier process ended, where there was one."""
    buffers: frozenset[str] = frozenset()
    """Which of the model's tensors no optimizer trains. Who handed in the initial weights has said so for all."""
    frozen: frozenset[str] = frozenset()
    """Which of its parameters required no gradient when training began, as the same client has said."""
    views: tuple[View, ...] = ()
    """The names that share memory with one of the model's tensors, as the same client has said."""
    broken: StrategyError | None = None
    """What the strategy died of: the job cannot go on."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Updates are counted: not so between rounds."""
    changes: Notifier = field(default_factory=Notifier)

    @property
    def is_small(self) -> bool:
        """True if the model is so small that handing it to a thread takes longer than the work."""
        return self.model is not None and self.model.size <= SMALL_BYTES

    @property
    def completed(self) -> int:
        """Committed rounds."""
        return self.model.round if self.model else 0
