"""Durable writes with retry: a full disk delays a round but never loses it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from ..state.training_state import TrainingState
from ..storage.checkpoints import CheckpointStore
from ..storage.round_record import RoundRecord
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.round_statistics import RoundStatistics
from ..telemetry.tracking.tracker import Tracker

log = logging.getLogger(__name__)

# Seconds.
CHECKPOINT_RETRY = 5.0
T = TypeVar("T")


class DurableWriter:
    """Writer to the state directory. Failures are shown in the status and in a metric until a retry succeeds."""

    def __init__(
        self, store: CheckpointStore, training: TrainingState, statistics: RoundStatistics, metrics: AggregatorMetrics,
        tracker: Tracker,
    ) -> None:  # fmt: skip
        self._store = store
        self._training = training
        self._statistics = statistics
        self._metrics = metrics
        self._tracker = tracker

    async def checkpoint(self, write: Callable[[], T]) -> T:
        """Call ``write`` in a thread, with retries; return its result once the checkpoint is durable."""

        async def in_thread() -> T:
            started = time.monotonic()
            result = await asyncio.to_thread(write)
            self._statistics.checkpointed(time.monotonic() - started)
            return result

        return await self._persistently("checkpoint", in_thread)

    async def keep(self, what: str, write: Callable[[], T]) -> T:
        """Call ``write`` in a thread, with retries; return its result. ``what`` is shown while it fails."""
        return await self._persistently(what, lambda: asyncio.to_thread(write))

    async def record(self, record: RoundRecord) -> None:
        """Write a round's record to disk, with retries, and hand it to the trackers."""

        async def here() -> None:
            # One line, which is not synced: handing it to a thread would take longer.
            self._store.append(record)

        await self._persistently("round's record", here)
        self._tracker.take(record)

    async def _persistently(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                result = await write()
            except OSError as error:
                self._metrics.checkpoint_failures.inc()
                message = f"the {what} cannot be written: {error.strerror or error}; trying again"
                self._training.storage_faults[what] = message
                log.error("%s", message)
                self._training.changes.notify()
                await asyncio.sleep(CHECKPOINT_RETRY)
            else:
                self._training.storage_faults.pop(what, None)
                return result

    async def retire(self, wanted: Collection[int]) -> None:
        """Remove old checkpoints, except those of the ``wanted`` rounds. Failures are logged and retried later."""
        try:
            await asyncio.to_thread(self._store.retire, wanted)
        except OSError as error:
            log.warning("old checkpoints cannot be removed: %s", error.strerror or error)
