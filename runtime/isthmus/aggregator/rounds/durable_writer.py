"""Writes to the state directory, again and again while that fails: a full disk costs time, never a round."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from ..state.training_state import TrainingState
from ..storage.checkpoints import CheckpointStore, RoundRecord
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.round_statistics import RoundStatistics
from ..telemetry.tracking.tracker import Tracker

log = logging.getLogger(__name__)

# Seconds.
CHECKPOINT_RETRY = 5.0
T = TypeVar("T")


class DurableWriter:
    """While something cannot be written, status and a metric tell."""

    def __init__(
        self,
        store: CheckpointStore,
        training: TrainingState,
        statistics: RoundStatistics,
        metrics: AggregatorMetrics,
        tracker: Tracker,
    ) -> None:
        self._store = store
        self._training = training
        self._statistics = statistics
        self._metrics = metrics
        self._tracker = tracker

    async def checkpoint(self, write: Callable[[], T]) -> T:
        """Has a checkpoint written, in a thread; returns when it is durable."""

        async def in_thread() -> T:
            started = time.monotonic()
            result = await asyncio.to_thread(write)
            self._statistics.checkpointed(time.monotonic() - started)
            return result

        return await self._persistently("checkpoint", in_thread)

    async def record(self, record: RoundRecord) -> None:
        """Writes a round's record down, and hands it to the trackers."""

        async def here() -> None:
            # A line, which is not synced: not worth a thread's errand.
            self._store.append(record)

        await self._persistently("round's record", here)
        self._tracker.take(record)

    async def _persistently(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                result = await write()
            except OSError as error:
                self._metrics.checkpoint_failures.inc()
                self._training.message = f"the {what} cannot be written: {error.strerror or error}; trying again"
                log.error("%s", self._training.message)
                self._training.changes.notify()
                await asyncio.sleep(CHECKPOINT_RETRY)
            else:
                self._training.message = ""
                return result

    async def retire(self, wanted: Collection[int]) -> None:
        """Drop old checkpoints but those of the ``wanted`` rounds. No client waits; what fails is tried again later."""
        try:
            await asyncio.to_thread(self._store.retire, wanted)
        except OSError as error:
            log.warning("old checkpoints cannot be removed: %s", error.strerror or error)
