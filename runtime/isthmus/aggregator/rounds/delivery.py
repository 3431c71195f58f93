"""Delivery of a job's final model and of the best one, whose checkpoints are kept until then."""

import asyncio
import json
import logging
from collections.abc import Mapping

from isthmus_contracts.pb import federation_pb2 as pb

from ..state.metrics_by_round import Progress
from ..state.training_state import TrainingState
from ..storage.checkpoints import Checkpoint, CheckpointError, CheckpointStore
from ..telemetry.tracking.tracker import Tracker
from .durable_writer import DurableWriter
from .model_publisher import ModelPublisher

log = logging.getLogger(__name__)

_NOTE = "best"


class Delivery:
    """Delivery of the model that met the objective's target, or else of the newest one."""

    def __init__(
        self, store: CheckpointStore, training: TrainingState, progress: Progress, writer: DurableWriter,
        publisher: ModelPublisher, tracker: Tracker,
    ) -> None:  # fmt: skip
        self._store = store
        self._training = training
        self._progress = progress
        self._writer = writer
        self._publisher = publisher
        self._tracker = tracker

    @property
    def met(self) -> bool:
        """True if a model meets the objective's target."""
        return self._progress.reached is not None

    @property
    def best(self) -> int | None:
        """Round of the best model; ``None`` if the objective's metric was never measured."""
        return self._progress.best.round if self._progress.best.name else None

    def notes(self) -> dict[str, str]:
        """Return the note that is committed with each model: the best model so far."""
        best = self._progress.best
        return {_NOTE: json.dumps({"metric": best.name, "round": best.round, "value": best.value})} if best.name else {}

    def noted(self, notes: Mapping[str, str]) -> tuple[int, float] | None:
        """Return round and value of the best model according to a checkpoint's notes."""
        best = json.loads(notes.get(_NOTE, "{}"))
        return (best["round"], best["value"]) if best.get("metric") == self._progress.objective.metric else None

    def show(self) -> None:
        """Publish the best model in the status."""
        if self.best is not None:
            self._publisher.publish_best(self.best, self._store.path(self.best))

    async def retire(self) -> None:
        """Remove the checkpoints that are no longer needed."""
        await self._writer.retire({number for number in (self.best, self._progress.reached) if number is not None})

    async def deliver(self, newest: Checkpoint) -> None:
        """Write the final model and the best one after training."""
        await self.retire()
        final = newest
        if (number := self._progress.reached) is not None and number != newest.round:
            final = await asyncio.to_thread(self._store.load, number)
        path, sha256 = await self._writer.checkpoint(lambda: self._store.write_final(final))
        self._publisher.finish(path, final.round, sha256)
        self._tracker.finish(path, sha256)
        try:
            await self._deliver_best(final)
        except (OSError, CheckpointError) as error:
            # The final model is written. A missing copy of the best one does not fail the job; its checkpoint stays.
            self._training.warnings.append(f"the best model, of round {self.best}, is in checkpoints/ only: {error}")
            log.warning("%s", self._training.warnings[-1])
        self._training.phase = pb.FederationStatus.COMPLETE
        log.info("complete: %d rounds, the model of round %d is in %s", newest.round, final.round, path)

    async def _deliver_best(self, final: Checkpoint) -> None:
        written = await asyncio.to_thread(self._store.write_best, self.best, final.round)
        if written is not None and self.best is not None:
            self._publisher.finish_best(written[0], self.best, written[1])
