"""Costs and participants of a round, for the metrics and for the round's record."""

from collections import Counter
from collections.abc import Set as AbstractSet

from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import ClientId
from ..storage.round_record import RoundRecord
from .metrics import AggregatorMetrics
from .stage_times import StageTimes, sanitize


class RoundStatistics:
    """Statistics of the round in progress. Clients' reports are added at its end, for updates that count."""

    def __init__(self, metrics: AggregatorMetrics) -> None:
        self._metrics = metrics
        self.begin()

    def begin(self) -> None:
        """Start over with a new round."""
        self._times = StageTimes()
        self._received = self._sent = 0
        # By client and base model: an update that is submitted again counts once.
        self._submissions: dict[tuple[ClientId, str], tuple[dict[str, float], int]] = {}

    def received(self, pool: str, codec: str, size: int, seconds: float) -> None:
        """Record the reception of a whole update: its encoded bytes and the seconds that it took."""
        self._metrics.received_bytes.labels(**self._metrics.bound, pool=pool, codec=codec).inc(size)
        self._received += size
        self._book("push", pool, seconds)

    def sent(self, pool: str, codec: str, size: int) -> None:
        """Record encoded bytes of a model that are sent."""
        self._metrics.sent_bytes.labels(**self._metrics.bound, pool=pool, codec=codec).inc(size)
        self._sent += size

    def submitted(self, header: pb.UpdateHeader, staleness: int = 0) -> None:
        """Record an accepted update, whose base model is ``staleness`` rounds older than the newest."""
        key = ((header.pool, header.index), header.base_digest)
        self._submissions[key] = (sanitize(header.seconds), staleness)

    def withdrawn(self, header: pb.UpdateHeader) -> None:
        """Remove an accepted update that could not be kept."""
        self._submissions.pop(((header.pool, header.index), header.base_digest), None)

    def folded(self, pool: str, seconds: float) -> None:
        """Record the seconds that folding an update took. Thread-safe."""
        self._book("fold", pool, seconds)

    def withdraw_all(self) -> None:
        """Remove all accepted updates, since a new sum begins."""
        self._submissions.clear()

    def phase(self, name: str, seconds: float) -> None:
        """Record the duration of a phase of secure aggregation."""
        self._times.add(f"secure_{name}", seconds)

    def checkpointed(self, seconds: float) -> None:
        """Record the seconds that writing a checkpoint took."""
        self._book("checkpoint", "", seconds)

    def close(
        self,
        record: RoundRecord,
        selected: AbstractSet[ClientId],
        completed: AbstractSet[ClientId],
        lost: AbstractSet[ClientId],
    ) -> None:
        """Complete the record of a finished round.

        ``lost``: clients that are disconnected, have failed or were refused. Without a completed update they count as
        failed; other clients without one were late.
        """
        for ((pool, _), _), (seconds, staleness) in self._submissions.items():
            self._metrics.accepted(pool, staleness)
            for stage, value in seconds.items():
                self._book(stage, pool, value)
        missing = selected - completed
        failed, late = missing & lost, missing - lost
        self._metrics.took_part(selected, {"completed": completed, "late": late, "failed": failed})
        record.selected, record.late, record.failed = len(selected), len(late), len(failed)
        record.stale_updates = sum(staleness > 0 for _, staleness in self._submissions.values())
        record.pools = dict(sorted(Counter(pool for (pool, _), _ in self._submissions).items()))
        record.received_bytes, record.sent_bytes = self._received, self._sent
        record.stages = self._times.summary()

    def _book(self, stage: str, pool: str, seconds: float) -> None:
        self._times.add(stage, seconds)
        self._metrics.stage_seconds.labels(**self._metrics.bound, stage=stage, pool=pool).observe(seconds)
