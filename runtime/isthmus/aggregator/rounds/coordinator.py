"""Training loop of a job: waits for clients, runs the rounds, delivers the result.

Everything here runs on one event loop; threads add updates to the result, write checkpoints and check large tensors. A
round advances only by the decisions of :mod:`..state.round_decision`, which this module carries out.
"""

import asyncio
import logging
import time
from collections.abc import Set

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ...strategies import Strategy, StrategyError
from ..clients.membership import Client, ClientId, Membership
from ..clients.selection import choose
from ..model import messages
from ..model.global_model import GlobalModel
from ..state.round_decision import LOST_CLIENT_GRACE, Decision, Verdict, blocking_client, decide
from ..state.training_state import ActiveRound, TrainingState
from ..storage.checkpoints import Checkpoint
from ..telemetry.round_statistics import RoundStatistics
from ..updates.intake import Intake
from .committer import RoundCommitter
from .delivery import Delivery
from .evaluation import ModelEvaluations
from .offers import Offers
from .privacy_budget import PrivacyBudget
from .secure_instances import SecureInstances
from .status import StatusReporter

log = logging.getLogger(__name__)


class Coordinator:
    """Runner of a job's rounds with the clients that are connected."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, members: Membership, strategy: Strategy, intake: Intake,
        offers: Offers, evaluations: ModelEvaluations, committer: RoundCommitter, delivery: Delivery,
        statistics: RoundStatistics, reporter: StatusReporter, budget: PrivacyBudget | None,
        secure: SecureInstances | None = None,
    ) -> None:  # fmt: skip
        """``secure``: what secure aggregation adds to the rounds of a job that uses it."""
        self._spec = spec
        self._training = training
        self._members = members
        self._strategy = strategy
        self._intake = intake
        self._offers = offers
        self._evaluations = evaluations
        self._committer = committer
        self._delivery = delivery
        self._statistics = statistics
        self._reporter = reporter
        self._budget = budget
        self._secure = secure

    async def run(self) -> None:
        """Run all rounds after the newest checkpoint, and return when training is complete.

        Raises:
            CheckpointError: the state directory cannot be used.
            StrategyError: the job cannot continue.
        """
        checkpoint = await self._committer.load()
        if checkpoint is None:
            checkpoint = await self._initialize()
        else:
            await self._committer.restore(checkpoint)
        model = self._committer.adopt(checkpoint)
        del checkpoint  # otherwise this frame would keep the first model in memory for the whole run
        recovered = await self._recovered(model)
        while model.round < self._spec.rounds and not self._delivery.met and not self._out_of_budget(model):
            if recovered is None:
                await self._wait_for_quorum()
            if not self._delivery.met:  # evaluations may have arrived meanwhile
                model = await self._train(model, recovered)
            recovered = None
        self._training.open.set()  # wake the updates that wait for the next round: there is none
        self._intake.receive_slots.clear()
        if not self._delivery.met:
            await self._evaluations.conclude(model, self._committer.contributors, self._committer.record, self._changed)
        await self._delivery.deliver(model.checkpoint)
        if model.round + 1 == self._training.resumed:
            await self._wait_for_clients()
        self.stop_all(pb.Stop.COMPLETE, "training is complete")
        self._reporter.refresh()
        self._training.changes.notify()

    async def _wait_for_clients(self) -> None:
        """Wait until the clients of a killed aggregator process have reconnected, so that they receive the end."""
        until = time.monotonic() + LOST_CLIENT_GRACE
        while len(self._members.trainers()) < self._spec.min_clients and time.monotonic() < until:
            await self._changed(until=until)

    def _out_of_budget(self, model: GlobalModel) -> bool:
        """Return whether the next round would exceed the privacy budget."""
        spent = self._budget is not None and self._budget.spent
        if spent:
            log.info("the privacy budget ends after round %d of %d", model.round, self._spec.rounds)
        return spent

    def wait_for(self, clients: int) -> None:
        """Set the number of clients that must be connected before the first round of this process.

        It applies besides the quorum and includes clients that only evaluate. No effect once that round has begun.
        """
        if self._training.awaited is not None:
            self._training.awaited = clients
            self._training.changes.notify()

    def stop_all(self, reason: "pb.Stop.Reason.ValueType", message: str) -> None:
        """Tell every client to stop."""
        for client in self._members:
            client.send(messages.stop(reason, message))

    async def _initialize(self) -> Checkpoint:
        """Commit the first valid initial weights that a client sends."""
        await self._wait_for_quorum()
        self._training.phase = pb.FederationStatus.INITIALIZING
        while self._training.initial is None:
            initialization, seconds = self._training.initialization, self._spec.stragglers.round_deadline_seconds
            client = initialization.choose(self._members.trainers(), time.monotonic(), seconds)
            if client is not None:
                log.info("asking %s for the initial weights", client.name)
                client.send(messages.INITIALIZE)
            await self._changed(until=initialization.until)
        checkpoint = await self._committer.commit_initial(self._training.initial)
        self._training.initial, self._training.initial_fault = None, ""  # the weights take as much memory as the model
        return checkpoint

    async def _wait_for_quorum(self) -> None:
        while message := self._missing():
            self._training.phase, self._training.waiting = pb.FederationStatus.WAITING, message
            await self._changed()
        self._training.awaited, self._training.waiting = None, ""

    def _missing(self) -> str:
        """Return how many clients are missing before a round can begin, in one line; empty if none are."""
        ready, needed = len(self._members.trainers()), self._spec.min_clients
        if ready < needed:
            return f"{ready} of {needed} needed clients are connected"
        connected, awaited = len(self._members.ready()), self._training.awaited or 0
        return f"{connected} of {awaited} clients are connected" if connected < awaited else ""

    async def _recovered(self, base: GlobalModel) -> ActiveRound | None:
        """Return the round on top of ``base`` that only lacks the opening of its masked sum, or ``None``."""
        if self._secure is None or self._delivery.met or base.round >= self._spec.rounds:
            return None
        return await self._secure.recovered(base, self._changed)

    async def _train(self, base: GlobalModel, recovered: ActiveRound | None = None) -> GlobalModel:
        """Run one round on top of ``base``; return its model once that is durable.

        If ``base`` turns out to meet the objective's target, abandon the round and return ``base``.
        """
        opened = recovered is not None and await self._go_on(recovered)
        current = recovered if recovered is not None and opened else await self._begin_round(base)
        await self._delivery.retire()
        while not opened:
            if not await self._collect(current):
                return await self._abandon(current)
            current.closing = True
            self._training.open.clear()
            opened = self._secure is None or await self._secure.open(current, self._changed)
            if not opened:
                await self._begin_instance(current)
        # Before the commit: after it, a restarted aggregator would not ask for these evaluations again.
        await self._evaluations.close(self._committer.record)
        if self._delivery.met:
            return await self._abandon(current, opened=True)
        if self._budget is not None:
            self._budget.discarded = self._discarded_sums()
        model = await self._committer.commit(current)
        if self._secure is not None:
            self._secure.end_round()
        return model

    async def _collect(self, current: ActiveRound) -> bool:
        """Wait until the round has its updates. Return false if its base model turns out to meet the target."""
        while not self._delivery.met:
            if self._training.broken is not None:
                raise self._training.broken
            decision = self._decide(current)
            self._training.waiting = "" if self._secure is None else self._secure.note
            if decision.verdict is Verdict.COMMIT:
                if not self._expects_evaluations(current):
                    return True
                await self._changed(until=current.started + LOST_CLIENT_GRACE)
                continue
            if decision.verdict is Verdict.EXTEND:
                await self._extend(current)
                continue
            if decision.verdict is Verdict.SELECT_MORE:
                if await self._select_more(current):
                    continue
                self._training.waiting = self._lacking(current)
            await self._changed(until=decision.recheck_at)
        return False

    def _decide(self, current: ActiveRound) -> Decision:
        now = time.monotonic()
        if self._secure is None:
            return decide(current, self._members.by_id, self._spec.min_updates, now)
        return self._secure.decide(current, now)

    async def _go_on(self, recovered: ActiveRound) -> bool:
        """Open the masked sum of a round that an earlier process has collected; return whether that succeeded."""
        assert self._secure is not None
        self._statistics.begin()
        for pool, index in recovered.accepted:
            self._statistics.submitted(pb.UpdateHeader(pool=pool, index=index, base_digest=recovered.base.digest))
        self._offers.begin_round()
        self._training.begin_round(recovered)
        recovered.closing = True
        self._training.open.clear()
        return await self._secure.settle(recovered, self._changed)

    def _discarded_sums(self) -> int:
        """Return how many noisy sums of this round the aggregator may have seen that no model came of."""
        return self._secure.failed_openings if self._secure is not None and self._spec.noise_contributors else 0

    async def _abandon(self, current: ActiveRound, *, opened: bool = False) -> GlobalModel:
        """End a round that is not needed, since its base model meets the objective's target; return that model.

        ``opened``: its updates are summed already.
        """
        current.closing = True
        if self._budget is not None and self._spec.noise_contributors:
            self._budget.discarded = self._discarded_sums() + opened
            self._budget.charge_discarded()
        await self._evaluations.close(self._committer.record)
        if current.folding:
            await asyncio.wait(current.folding.values())
        if self._secure is not None:
            self._secure.end_round()
        self._training.end_round()
        log.info("round %d meets the objective's target; round %d is abandoned", current.base.round, current.number)
        return current.base

    def _expects_evaluations(self, current: ActiveRound) -> bool:
        """Return whether clients are about to repeat evaluations that they sent to a killed aggregator process.

        An update that was ready then arrives by itself; the evaluation of its base model arrives after the round is
        offered again.
        """
        soon = current.number == self._training.resumed and time.monotonic() < current.started + LOST_CLIENT_GRACE
        return soon and bool(self._evaluations.missing & current.accepted)

    async def _begin_round(self, base: GlobalModel) -> ActiveRound:
        number, now, trainers = base.round + 1, time.monotonic(), self._members.trainers()
        choice = choose(self._spec, number, [client.id for client in trainers], self._intake.client_history)
        deadline = now + self._spec.stragglers.round_deadline_seconds
        current = ActiveRound(number, now, deadline, target=choice.target, base=base)
        permissions = self._intake.permissions
        resuming = [client.id for client in trainers if permissions.resumes(client, number, base.digest)]
        current.selected.update(choice.clients, resuming)
        if self._secure is None:
            self._strategy.begin(base.checkpoint.state)
        self._statistics.begin()
        self._offers.begin_round()
        self._training.begin_round(current)
        log.info("round %d: %d of %d ready clients", number, len(current.selected), len(trainers))
        if self._secure is not None:
            await self._begin_instance(current)
            return current
        for client in trainers:
            if client.id in current.selected:
                self._offers.train(client, current)
        self._training.changes.notify()
        return current

    async def _begin_instance(self, current: ActiveRound, among: Set[ClientId] | None = None) -> None:
        """Begin an instance of secure aggregation among the selected clients, or among those given."""
        assert self._secure is not None
        chosen = frozenset(current.selected if among is None else among)

        def candidates() -> list[Client]:
            wanted = chosen - current.rejected
            return [client for client in self._members.trainers() if client.id in wanted]

        await self._secure.begin(current, candidates)

    async def _select_more(self, current: ActiveRound) -> bool:
        """Select all remaining clients in place of those that are lost; return whether there are any.

        With secure aggregation no client can join an instance, so another one begins, if there are enough clients.
        """
        if self._secure is not None:
            present = [client for client in self._members.trainers() if client.id not in current.rejected]
            if not self._secure.can_begin(present):
                return False
            current.selected.update(client.id for client in present)
            await self._begin_instance(current)
            return True
        further = [client for client in self._members.trainers() if client.id not in current.selected]
        for client in further:
            current.selected.add(client.id)
            self._offers.train(client, current)
        return bool(further)

    def _lacking(self, current: ActiveRound) -> str:
        """Return how many updates a round lacks, and why, in one line."""
        have, need = current.updates, self._spec.min_updates if self._secure is None else self._secure.needed
        refused = f"; refused: {current.fault}" if current.fault else ""
        refused += "; a lower learning rate may help" if current.diverged else ""
        return f"round {current.number} has {have} of {need} needed updates; waiting for clients{refused}"

    async def _extend(self, current: ActiveRound) -> None:
        """Extend the deadline and repeat the offer to clients without an accepted update. Raise StrategyError."""
        spec = self._spec
        if (client := blocking_client(current, spec.backoff_limit, spec.most_trainers, spec.min_updates)) is not None:
            raise StrategyError(
                f"round {current.number} cannot end: {client[0]}/{client[1]} has submitted NaN, infinity or huge"
                f" numbers {current.diverged[client]} times, and a round needs {spec.min_updates} updates;"
                " a lower learning rate may help"
            )
        log.warning(
            "round %d: %d of %d needed updates at the deadline, which is extended",
            current.number, current.updates, spec.min_updates,
        )  # fmt: skip
        current.deadline = time.monotonic() + spec.stragglers.round_deadline_seconds
        if self._secure is not None:
            self._secure.extended(current)
            # Those that have handed in need not wait for the others, if they are enough for an instance of their own.
            present = {client.id for client in self._members.trainers()}
            done = current.accepted & present
            current.selected |= present
            await self._begin_instance(current, done if len(done) >= self._secure.fewest else None)
            return
        current.rejected.clear()
        for trainer in self._members.trainers():
            if trainer.id in current.selected - current.accepted:
                self._offers.train(trainer, current)

    async def _changed(self, until: float | None = None) -> None:
        """Wait for a change, or until the given time (monotonic seconds)."""
        self._delivery.show()
        self._reporter.refresh_soon()
        self._training.changes.notify_listeners()
        await self._training.changes.wait(until)
