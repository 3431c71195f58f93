"""Committed state of a job: computes and commits the result of each round, and restores it after a restart."""

import asyncio
import json
import logging
import time
from concurrent.futures import Executor

from isthmus_contracts.api.federated_job import FederatedJobSpec

from ... import views
from ...strategies import Strategy
from ...tensors import State
from ..clients.client_history import ClientHistory
from ..clients.membership import ClientId, Membership
from ..model import messages
from ..model.compression import Broadcast, Compression
from ..model.global_model import GlobalModel
from ..state.confirmation import ClientMeasurements
from ..state.metrics_by_round import Progress
from ..state.training_state import ActiveRound, TrainingState
from ..storage.checkpoints import VIEWS, Checkpoint, CheckpointError, CheckpointStore
from ..storage.round_record import RoundRecord
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.round_statistics import RoundStatistics
from ..updates.intake import Intake
from .commit_record import RECORD, committed_record, record_of
from .delivery import Delivery
from .durable_writer import DurableWriter
from .evaluation import ModelEvaluations
from .model_publisher import ModelPublisher
from .offers import Offers
from .privacy_budget import PrivacyBudget

log = logging.getLogger(__name__)

# Notes that are committed with a model, besides the round's record.
_CLIENTS, _BUFFERS, _FROZEN = "clients", "buffers", "frozen"


class RoundCommitter:
    """Writer of a durable model from the updates of a round."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, members: Membership, store: CheckpointStore,
        strategy: Strategy, compression: Compression, folder: Executor, progress: Progress, intake: Intake,
        offers: Offers, evaluations: ModelEvaluations, writer: DurableWriter, publisher: ModelPublisher,
        delivery: Delivery, statistics: RoundStatistics, metrics: AggregatorMetrics, budget: PrivacyBudget | None,
    ) -> None:  # fmt: skip
        """``folder``: the thread in which updates are added to the result."""
        self._spec = spec
        self._training = training
        self._members = members
        self._store = store
        self._strategy = strategy
        self._compression = compression
        self._folder = folder
        self._progress = progress
        self._intake = intake
        self._offers = offers
        self._evaluations = evaluations
        self._writer = writer
        self._publisher = publisher
        self._delivery = delivery
        self._statistics = statistics
        self._metrics = metrics
        self._budget = budget
        # Reported with the updates, by clients that measure while they train.
        self._measurements = ClientMeasurements(spec.objective, spec.folds_late)
        self.contributors: set[ClientId] = set()
        """Clients whose updates are in the newest model, if this process committed it."""
        self.record: RoundRecord | None = None
        """Record of the newest committed round."""

    async def load(self) -> Checkpoint | None:
        """Open the state directory and return the newest checkpoint. Raise :class:`CheckpointError`."""
        await asyncio.to_thread(self._store.open)
        checkpoint = await asyncio.to_thread(self._store.latest)
        if self._budget is not None:
            self._budget.restore(committed_record(checkpoint), self._store.records())
        return checkpoint

    async def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of an earlier process. Raise :class:`CheckpointError`."""
        records, best = await self._records(checkpoint), self._delivery.noted(checkpoint.notes)
        self._progress.restore(records, self._store.numbers(), best)
        log.info("resuming after round %d of %d", checkpoint.round, self._spec.rounds)
        self._strategy.load_state(checkpoint.strategy)
        self._training.resumed = checkpoint.round + 1
        await self._restore_history(checkpoint)
        self._training.buffers = frozenset(json.loads(checkpoint.notes[_BUFFERS]))
        self._training.frozen = frozenset(json.loads(checkpoint.notes[_FROZEN]))
        self._training.views = checkpoint.views

    async def _records(self, checkpoint: Checkpoint) -> list[RoundRecord]:
        """Return the records up to a checkpoint, whose own record may be missing from the file after a crash."""
        records = self._store.records(checkpoint.round)
        committed = committed_record(checkpoint)
        if committed is not None and (not records or records[-1].round < checkpoint.round):
            records.append(committed)
            await self._writer.record(committed)
        self.record = records[-1] if records and records[-1].round == checkpoint.round else None
        return records

    async def _restore_history(self, checkpoint: Checkpoint) -> None:
        """Restore the clients' history, and the earlier models that late updates may start from."""
        if not self._keeps_history:
            return
        try:
            self._intake.client_history = ClientHistory.of_text(checkpoint.notes.get(_CLIENTS, "[]"))
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.file.path}: {error}; remove it to continue from the previous one"
            ) from None
        await asyncio.to_thread(self._intake.base_models.restore, self._store, checkpoint.round)

    async def commit_initial(self, weights: State) -> Checkpoint:
        """Commit the initial weights as the model of round 0."""
        return await self._writer.checkpoint(lambda: self._store.save(0, weights, notes=self._notes()))

    async def commit(self, current: ActiveRound) -> GlobalModel:
        """Compute a round's result and make it the global model once it is durable."""
        base = current.base
        result, broadcast = await asyncio.get_running_loop().run_in_executor(
            self._folder, self._compression.next_model, self._strategy.finish, current.number, base.checkpoint.state,
            base.digest, self._training.buffers,
        )  # fmt: skip
        present = {client.id for client in self._members.trainers()}
        record = record_of(
            current,
            self._progress,
            self._budget,
            self._measurements,
            present,
            robust=self._spec.strategy.one_update_per_client,
        )
        history = self._updated_history(current)
        notes = {**self._notes(), RECORD: record.text()}
        if self._keeps_history:
            notes[_CLIENTS] = history.text()
        checkpoint = await self._writer.checkpoint(
            lambda: self._store.save(current.number, result, self._strategy.state(), notes)
        )
        self._intake.client_history = history
        await self._finish_round(current, record)
        return self.adopt(checkpoint, broadcast)

    def _notes(self) -> dict[str, str]:
        """Return the notes that are committed with each model."""
        constant = ((_BUFFERS, self._training.buffers), (_FROZEN, self._training.frozen))
        notes = {name: json.dumps(sorted(names)) for name, names in constant} | self._delivery.notes()
        return notes | ({VIEWS: views.to_text(self._training.views)} if self._training.views else {})

    @property
    def _keeps_history(self) -> bool:
        return self._spec.folds_late or self._spec.selection.policy == "Adaptive"

    def _updated_history(self, current: ActiveRound) -> ClientHistory:
        """Return the clients' history including this round."""
        if not self._keeps_history:
            return self._intake.client_history
        now, missed = time.monotonic(), {}
        for client_id in current.selected - current.accepted:
            client = self._members.get(client_id)
            training = client is not None and client.ready and client_id not in current.rejected
            missed[client_id] = client.since_offer(current.number, now) if client is not None and training else None
        return self._intake.client_history.after_round(
            current.number, current.selected, missed, current.reports, self._spec.stragglers.max_staleness
        )

    async def _finish_round(self, current: ActiveRound, record: RoundRecord) -> None:
        """Complete the records of a round whose checkpoint is durable."""
        if self._budget is not None:
            self._budget.charge()
        await self._evaluations.close(self.record)  # evaluations that arrived during the commit
        record.seconds, record.time = time.monotonic() - current.started, time.time()
        away = {client.id for client in self._members if not client.ready}
        self._statistics.close(record, current.selected, current.accepted, away | current.rejected)
        self.record = record
        await self._writer.record(record)
        self._progress.take(current.number, record.metrics, record.confirmed.get(self._spec.objective.metric))
        self._training.end_round()
        self.contributors = current.accepted | {client for client, _ in current.late}
        self._metrics.round_seconds.observe(record.seconds)
        log.info("round %d committed: %d updates, %.2f s", current.number, current.updates, record.seconds)

    def adopt(self, checkpoint: Checkpoint, broadcast: Broadcast | None = None) -> GlobalModel:
        """Make a durable checkpoint the global model, and notify the clients."""
        model = GlobalModel.of(checkpoint, self._spec.total_clients, broadcast)
        self._training.model = model
        self._metrics.model_bytes.set(model.size)
        self._intake.base_models.add(checkpoint)
        self._publisher.publish(checkpoint)
        self._evaluations.begin()
        for client in self._members:
            client.send(messages.committed(checkpoint.round))
            self._offers.evaluate_only(client, model)
        self._training.changes.notify()
        return model
