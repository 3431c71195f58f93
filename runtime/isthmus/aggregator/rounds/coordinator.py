"""The rounds of one job: who is offered work, what is accepted, and when a round is committed.

Everything here runs on one event loop; folding, checkpoints and checks of large tensors run in threads. A round moves
on only through :mod:`.decisions`; this module carries the decisions out.
"""

import asyncio
import json
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ... import views
from ...strategies import Strategy, StrategyError
from ...tensors import State
from ..clients.client_history import ClientHistory
from ..clients.membership import Client, ClientId, Membership
from ..clients.outbox import Outbox
from ..clients.selection import choose
from ..job import Job
from ..model import messages
from ..model.compression import Broadcast, Compression
from ..model.global_model import GlobalModel
from ..state.confirmation import ClientMeasurements
from ..state.metrics_by_round import Progress, WeightedMeans
from ..state.round_decision import LOST_CLIENT_GRACE, RoundState, Verdict, blocking_client, decide
from ..state.training_state import TrainingState
from ..storage.checkpoints import VIEWS, Checkpoint, CheckpointError, CheckpointStore, RoundRecord
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.round_statistics import RoundStatistics
from ..telemetry.tracking.tracker import Tracker
from ..updates.intake import Intake
from .commit_record import RECORD, committed_record, record_of
from .delivery import Delivery
from .durable_writer import DurableWriter
from .evaluation import Evaluations
from .handover import Handover
from .model_publisher import ModelPublisher
from .offers import Offers
from .privacy_budget import PrivacyBudget
from .status import StatusReporter

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
# What is committed with a model, besides the round's record.
_CLIENTS, _BUFFERS, _FROZEN = "clients", "buffers", "frozen"


class Coordinator:
    """Runs a job's rounds over whatever clients are there. ``run()`` returns when training is complete."""

    def __init__(
        self, job: Job, store: CheckpointStore, strategy: Strategy, metrics: AggregatorMetrics, tracker: Tracker,
        budget: PrivacyBudget | None = None,
    ) -> None:  # fmt: skip
        """``budget``: of differential privacy, which ``strategy`` then has."""
        self.job = job
        self.spec = job.spec
        self.instance = uuid.uuid4().hex
        """Of this process."""
        self.metrics = metrics
        self.members = Membership(job.spec)
        self.compression = Compression(job.spec)
        self.training = TrainingState()
        self.handover = Handover(self.members, self.training, self._ask_again)
        self.statistics = RoundStatistics(metrics)
        # One thread, first in first out: updates are folded one by one, and a round's result is computed after them.
        self._folder = ThreadPoolExecutor(1, "fold")
        self.intake = Intake(
            job, self.training, self.members, self.compression, strategy, self.statistics, self._folder, store.directory
        )
        self._store = store
        self._strategy = strategy
        self._budget = budget
        self.progress = Progress(job.spec.objective)
        self._contributors: set[ClientId] = set()  # to the newest committed round
        self._record: RoundRecord | None = None  # of the newest committed round
        self._measurements = ClientMeasurements(
            job.spec.objective, job.spec.folds_late
        )  # by what clients measure while they train
        self._offers = Offers(job.spec, self.training, self.compression, self.statistics)
        self._writer = DurableWriter(store, self.training, self.statistics, metrics, tracker)
        self._evaluations = Evaluations(
            job.spec, self.training, self.members, self.progress, self._offers, self._writer
        )
        self._publisher = ModelPublisher(store.directory, self.training.changes)
        self._delivery = Delivery(store, self.training, self.progress, self._writer, self._publisher, tracker)
        self._reporter = StatusReporter(
            job.spec, self.training, self.members, self.progress, tracker, self._publisher, metrics, budget
        )

    # ---- the course of training

    async def run(self) -> None:
        """All rounds, from the newest checkpoint on. Raises :class:`CheckpointError`."""
        self.metrics.rounds_planned.set(self.spec.rounds)
        await asyncio.to_thread(self._store.open)
        checkpoint = await asyncio.to_thread(self._store.latest)
        if self._budget is not None:
            self._budget.restore(committed_record(checkpoint), self._store.records())
        if checkpoint is None:
            checkpoint = await self._initialize()
        else:
            self.progress.restore(
                await self._records(checkpoint), self._store.numbers(), self._delivery.noted(checkpoint.notes)
            )
            log.info("resuming after round %d of %d", checkpoint.round, self.spec.rounds)
            self._strategy.load_state(checkpoint.strategy)
            self.training.resumed = checkpoint.round + 1
            await self._remember(checkpoint)
        self.training.buffers = frozenset(json.loads(checkpoint.notes.get(_BUFFERS, "[]")))
        self.training.frozen = frozenset(json.loads(checkpoint.notes.get(_FROZEN, "[]")))
        self.training.views = checkpoint.views
        await self._adopt(checkpoint)
        while checkpoint.round < self.spec.rounds and not self._delivery.met and not self._out_of_budget(checkpoint):
            await self._wait_for_quorum()
            if not self._delivery.met:  # a pool that evaluates may have said so meanwhile
                checkpoint = await self._train(checkpoint)
        self.training.open.set()  # whoever waits hears that it is over
        self.intake.receive_slots.clear()
        if not self._delivery.met:
            await self._evaluations.conclude(self._contributors, self._record, self._changed)
        await self._delivery.deliver(checkpoint)
        if checkpoint.round + 1 == self.training.resumed:
            await self._wait_for_clients()
        self.stop_all(pb.Stop.COMPLETE, "training is complete")
        self._reporter.refresh()
        self.training.changes.notify()

    async def _wait_for_clients(self) -> None:
        """Wait for clients of an aggregator that was killed: they shall hear that it is over."""
        until = time.monotonic() + LOST_CLIENT_GRACE
        while len(self.members.trainers()) < self.spec.min_clients and time.monotonic() < until:
            await self._changed(until=until)

    def _out_of_budget(self, checkpoint: Checkpoint) -> bool:
        """Return whether the next round would cost more privacy than the job has."""
        spent = self._budget is not None and self._budget.spent
        if spent:
            log.info("the privacy budget ends after round %d of %d", checkpoint.round, self.spec.rounds)
        return spent

    def wait_for(self, clients: int) -> None:
        """Sets how many clients, those included that only evaluate, are to be there before the first round of this
        process, besides the quorum. Without effect once they were."""
        if self.training.awaited is not None:
            self.training.awaited = clients
            self.training.changes.notify()

    def stop_all(self, reason: "pb.Stop.Reason.ValueType", message: str) -> None:
        """Tells every client to stop."""
        for client in self.members:
            client.send(messages.stop(reason, message))

    async def _initialize(self) -> Checkpoint:
        """The first model: the initial weights of the first client that hands in good ones."""
        await self._wait_for_quorum()
        self.training.phase = pb.FederationStatus.INITIALIZING
        while self.training.initial is None:
            initialization, seconds = self.training.initialization, self.spec.stragglers.round_deadline_seconds
            client = initialization.choose(self.members.trainers(), time.monotonic(), seconds)
            if client is not None:
                log.info("asking %s for the initial weights", client.name)
                client.send(messages.INITIALIZE)
            await self._changed(until=initialization.until)
        initial = self.training.initial
        checkpoint = await self._writer.checkpoint(lambda: self._store.save(0, initial, notes=self._notes()))
        self.training.initial, self.training.message = None, ""  # the weights take as much memory as the model
        return checkpoint

    async def _wait_for_quorum(self) -> None:
        while message := self._missing():
            self.training.phase, self.training.message = pb.FederationStatus.WAITING, message
            await self._changed()
        self.training.awaited, self.training.message = None, ""

    def _missing(self) -> str:
        """Return which clients a round cannot begin without; empty where they are there."""
        ready, needed = len(self.members.trainers()), self.spec.min_clients
        if ready < needed:
            return f"{ready} of {needed} needed clients are connected"
        connected, awaited = len(self.members.ready()), self.training.awaited or 0
        return f"{connected} of {awaited} clients are connected" if connected < awaited else ""

    async def _train(self, base: Checkpoint) -> Checkpoint:
        """One round on top of ``base``; returns when its checkpoint is durable.

        Where ``base`` turns out to meet the objective's target, the round is given up, and ``base`` returned.
        """
        state = self._begin_round(base)
        await self._delivery.retire()
        while True:
            if self._delivery.met:
                return await self._abandon(state, base)
            if self.training.broken is not None:
                raise self.training.broken
            decision = decide(state, self.members.by_id, self.spec.min_updates, time.monotonic())
            if decision.verdict is Verdict.COMMIT:
                if not self._evaluations_follow(state):
                    break
                await self._changed(until=state.started + LOST_CLIENT_GRACE)
                continue
            if decision.verdict is Verdict.SELECT_MORE:
                self._select_more(state)
            elif decision.verdict is Verdict.EXTEND:
                self._extend(state)
                continue
            await self._changed(until=decision.recheck_at)
        self.training.closing = True
        self.training.open.clear()
        # Before the commit: once that is durable, a restart would not ask for these measurements again.
        await self._evaluations.close(self._record)
        if self._delivery.met:
            return await self._abandon(state, base)
        result, broadcast = await asyncio.get_running_loop().run_in_executor(
            self._folder, self.compression.next_model, self._strategy.finish, state.number, base.state, base.digest,
            self.training.buffers,
        )  # fmt: skip
        present = {client.id for client in self.members.trainers()}
        record = record_of(state, self.training, self.progress, self._budget, self._measurements, present)
        book = self._updated_history(state)
        notes = {**self._notes(), RECORD: record.text()}
        if self._keeps_history:
            notes[_CLIENTS] = book.text()
        checkpoint = await self._writer.checkpoint(
            lambda: self._store.save(state.number, result, self._strategy.state(), notes)
        )
        self.intake.client_history = book
        await self._conclude(state, record)
        await self._adopt(checkpoint, broadcast)
        return checkpoint

    async def _abandon(self, state: RoundState, base: Checkpoint) -> Checkpoint:
        """End a round that is not needed: ``base``, from which it began, meets the objective's target."""
        self.training.closing = True
        await self._evaluations.close(self._record)
        if state.folding:
            await asyncio.wait(state.folding.values())
        self.training.round = None
        log.info("round %d meets the objective's target; round %d is given up", base.round, state.number)
        return base

    def _evaluations_follow(self, state: RoundState) -> bool:
        """Whether clients will repeat in a moment what they told an aggregator that was killed.

        An update that was in hand then comes by itself; the measurement of the model that it began with comes once the
        round is offered again.
        """
        soon = state.number == self.training.resumed and time.monotonic() < state.started + LOST_CLIENT_GRACE
        return soon and bool(self._evaluations.missing & state.accepted)

    def _notes(self) -> dict[str, str]:
        """Return what is committed with each model."""
        still = ((_BUFFERS, self.training.buffers), (_FROZEN, self.training.frozen))
        notes = {name: json.dumps(sorted(names)) for name, names in still} | self._delivery.notes()
        return notes | ({VIEWS: views.to_text(self.training.views)} if self.training.views else {})

    def _begin_round(self, base: Checkpoint) -> RoundState:
        number, now = base.round + 1, time.monotonic()
        ready = [client.id for client in self.members.trainers()]
        choice = choose(self.spec, number, ready, self.intake.client_history)
        state = RoundState(number, now, now + self.spec.stragglers.round_deadline_seconds, target=choice.target)
        permissions = self.intake.permissions
        working = [client.id for client in self.members.trainers() if permissions.resumes(client, number, base.digest)]
        state.selected.update(choice.clients, working)
        self._strategy.begin(base.state)
        self.statistics.begin()
        self._offers.begin()
        self.training.round, self.training.round_started, self.training.closing = state, time.time(), False
        self.training.means, self.training.examples = WeightedMeans(self.spec.strategy.one_update_per_client), 0
        self.training.phase, self.training.message = pb.FederationStatus.TRAINING, ""
        self.training.open.set()
        log.info("round %d: %d of %d ready clients", number, len(state.selected), len(ready))
        for client in self.members.trainers():
            if client.id in state.selected:
                self._offers.train(client, state)
        self.training.changes.notify()
        return state

    def _select_more(self, state: RoundState) -> None:
        """Clients that the round did not select, or that came later, take the places of those that are lost."""
        for client in self.members.trainers():
            if client.id not in state.selected:
                state.selected.add(client.id)
                self._offers.train(client, state)
        have, need = state.updates, self.spec.min_updates
        refused = f"; refused: {state.fault}" if state.fault else ""
        refused += "; a lower learning rate may help" if state.diverged else ""
        self.training.message = (
            f"round {state.number} has {have} of {need} needed updates; waiting for clients{refused}"
        )

    def _extend(self, state: RoundState) -> None:
        spec = self.spec
        if (lost := blocking_client(state, spec.backoff_limit, spec.most_trainers, spec.min_updates)) is not None:
            raise StrategyError(
                f"round {state.number} cannot end: {lost[0]}/{lost[1]} has handed in NaN, infinity or huge numbers"
                f" {state.diverged[lost]} times, and a round needs {spec.min_updates} updates;"
                " a lower learning rate may help"
            )
        log.warning(
            "round %d: %d of %d needed updates at the deadline; it goes on",
            state.number, state.updates, self.spec.min_updates,
        )  # fmt: skip
        state.deadline = time.monotonic() + self.spec.stragglers.round_deadline_seconds
        state.rejected.clear()
        for client in self.members.trainers():
            if client.id in state.selected - state.accepted:
                self._offers.train(client, state)

    async def _records(self, checkpoint: Checkpoint) -> list[RoundRecord]:
        """The records up to a checkpoint, whose own may not have come so far as the file when we were killed."""
        records = self._store.records(checkpoint.round)
        if RECORD in checkpoint.notes and (not records or records[-1].round < checkpoint.round):
            records.append(RoundRecord.of_text(checkpoint.notes[RECORD]))
            await self._writer.record(records[-1])
        self._record = records[-1] if records and records[-1].round == checkpoint.round else None
        return records

    async def _remember(self, checkpoint: Checkpoint) -> None:
        """Takes up what earlier processes knew of the clients, and of models that late updates may come from."""
        if not self._keeps_history:
            return
        try:
            self.intake.client_history = ClientHistory.of_text(checkpoint.notes.get(_CLIENTS, "[]"))
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.file.path}: {error}; remove it to go on from the one before") from None
        await asyncio.to_thread(self.intake.base_models.restore, self._store, checkpoint.round)

    @property
    def _keeps_history(self) -> bool:
        return self.spec.folds_late or self.spec.selection.policy == "Adaptive"

    def _updated_history(self, state: RoundState) -> ClientHistory:
        """Return what is known of the clients, after a round."""
        if not self._keeps_history:
            return self.intake.client_history
        now, missed = time.monotonic(), {}
        for client_id in state.selected - state.accepted:
            client = self.members.get(client_id)
            at_work = client is not None and client.ready and client_id not in state.rejected
            missed[client_id] = client.took(state.number, now) if client is not None and at_work else None
        return self.intake.client_history.after_round(
            state.number, state.selected, missed, state.reports, self.spec.stragglers.max_staleness
        )

    async def _conclude(self, state: RoundState, record: RoundRecord) -> None:
        """Books a round whose checkpoint is durable."""
        if self._budget is not None:
            self._budget.charge()
        await self._evaluations.close(self._record)  # those that came meanwhile
        record.seconds, record.time = time.monotonic() - state.started, time.time()
        away = {client.id for client in self.members if not client.ready}
        self.statistics.close(record, state.selected, state.accepted, away | state.rejected)
        self._record = record
        await self._writer.record(record)
        self.progress.take(state.number, record.metrics, record.confirmed.get(self.spec.objective.metric))
        self.training.round, self._contributors = None, state.accepted | {client for client, _ in state.late}
        self.metrics.round_seconds.observe(record.seconds)
        log.info("round %d committed: %d updates, %.2f s", state.number, state.updates, record.seconds)

    async def _adopt(self, checkpoint: Checkpoint, broadcast: Broadcast | None = None) -> None:
        """Makes a durable checkpoint the global model, and tells the clients."""
        self.training.model = GlobalModel.of(checkpoint, self.spec.total_clients, broadcast)
        self.metrics.model_bytes.set(self.training.model.size)
        self.intake.base_models.add(checkpoint)
        self._publisher.publish(checkpoint)
        self._evaluations.begin()
        for client in self.members:
            client.send(messages.committed(checkpoint.round))
            self._offers.watch(client)
        self.training.changes.notify()

    # ---- what clients say

    def join(self, hello: pb.Hello) -> Client:
        """A client's hello: it is welcomed and told what there is for it now. Raises :class:`membership.Refusal`."""
        self.intake.permissions.check_hello(hello)
        client = self.members.admit(hello)
        client.send(messages.welcome(HEARTBEAT_SECONDS, self.spec.rounds, self.instance))
        if self.training.model is not None:
            client.send(messages.committed(self.training.model.round))
            self._offers.watch(client)
        match self.training.phase:
            case pb.FederationStatus.COMPLETE:
                client.send(messages.stop(pb.Stop.COMPLETE, "training is complete"))
            case pb.FederationStatus.INITIALIZING if self.training.initialization.asked(client.id):
                client.send(messages.INITIALIZE)
            case pb.FederationStatus.EVALUATING if client.evaluates and self.training.model is not None:
                self._offers.evaluate(client)
            case _:
                self._ask_again(client)
        log.info("%s joined (attempt %d)", client.name, client.attempt)
        self.training.changes.notify()
        return client

    def _ask_again(self, client: Client) -> None:
        """Repeats the offer that a client had before it came back, or we did."""
        state, model = self.training.round, self.training.model
        if state is None or model is None or self.training.closing:
            return
        if self.intake.permissions.resumes(client, state.number, model.digest):
            state.selected.add(client.id)
        if client.id in state.selected - state.accepted - state.rejected:
            self._offers.train(client, state)

    def leave(self, client: Client, outbox: Outbox) -> None:
        """A control stream has ended."""
        self.members.leave(client, outbox)
        log.info("%s disconnected", client.name)
        self.training.changes.notify()

    def hear(self, client: Client, message: pb.ClientMessage) -> None:
        """Any later message of a client."""
        client.last_heard = time.monotonic()
        match message.WhichOneof("message"):
            case "heartbeat":
                client.stage = one_line(message.heartbeat.stage, 32)
            case "evaluation":
                self._evaluations.take(client, message.evaluation)
            case "failure" if not client.failed:  # it says so once: nothing comes after it
                self.members.fail(client, message.failure)
                log.warning("%s failed: %s", client.name, one_line(message.failure.message))
                self.training.changes.notify()
            case "leaving":
                log.info("%s leaves: %s", client.name, one_line(message.leaving.reason))

    @property
    def companion(self) -> State:
        """What the strategy sends along with the model."""
        return self._strategy.companion()

    def status(self) -> pb.FederationStatus:
        """Return what the operator sees."""
        return self._reporter.status()

    async def _changed(self, until: float | None = None) -> None:
        """Waits for a change, or until the given time (monotonic seconds)."""
        self._delivery.show()
        self._reporter.refresh_soon()
        self.training.changes.notify_listeners()
        await self.training.changes.wait(until)
