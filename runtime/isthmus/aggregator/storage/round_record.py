"""Record of a round: one line of rounds.jsonl."""

import json
from dataclasses import dataclass, field, fields


@dataclass
class RoundRecord:
    """Results and costs of one round."""

    round: int
    seconds: float
    updates: int
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    """Training metrics of the round (train_...) and, once clients have evaluated its model, evaluation metrics."""
    time: float = 0.0
    """Time of the commit, in seconds since the epoch."""
    selected: int = 0
    """Number of clients that took part. ``updates`` of them submitted; the others were late or failed."""
    late: int = 0
    """Number of clients that were still training when the round ended."""
    failed: int = 0
    """Number of clients that had disconnected, or whose update was refused."""
    stale_updates: int = 0
    """Number of updates that were trained for earlier rounds."""
    pools: dict[str, int] = field(default_factory=dict)
    """Number of updates by pool."""
    received_bytes: int = 0
    """Encoded bytes of whole updates."""
    sent_bytes: int = 0
    """Encoded bytes of models that were sent during the round."""
    privacy: dict[str, float] = field(default_factory=dict)
    """With differential privacy: ``epsilon`` and ``delta`` of all models up to this one, the ``rounds`` and
    ``mu_squared`` that they follow from, the ``clipped_ratio`` of this round's updates, the ``clip_norm`` that they
    were clipped to, and the ``next_clip_norm``."""
    secure: dict[str, float] = field(default_factory=dict)
    """With secure aggregation: ``dropouts`` (clients whose update is not in the sum), ``parties`` of the contributors,
    and ``clipped_ratio``, the share of all their coordinates that the bounds cut."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """``mean`` and ``max`` seconds of each stage: over the clients (wait, pull, evaluate, train, encode), over the
    updates (push, fold), and of the checkpoint."""
    confirmed: dict[str, float] = field(default_factory=dict)
    """Lower bound of the objective's metric that more than half of the clients asked confirm; empty while too few have
    measured it."""

    def text(self) -> str:
        """Return the record as a line of JSON."""
        return json.dumps(self.__dict__)

    @classmethod
    def of_text(cls, line: str) -> "RoundRecord":
        """Parse the output of :meth:`text`, in which fields may be missing or unknown. Raise ``ValueError``."""
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in json.loads(line).items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a record of a round: {error}") from None
