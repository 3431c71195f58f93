"""Evaluation of committed models where secure aggregation masks all measurements.

The measurements of a base model ride in the updates that start from it. The final model, from which no update starts,
gets an instance of its own, whose vector holds nothing else.
"""

import logging
import time
from collections.abc import Collection

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import Client, ClientId, Membership
from ..model.global_model import GlobalModel
from ..secure.rounds import SecureRounds
from ..state.metrics_by_round import Progress
from ..state.round_decision import LOST_CLIENT_GRACE, Verdict
from ..state.round_sums import RoundSums
from ..state.training_state import ActiveRound, TrainingState
from ..storage.round_record import RoundRecord
from .durable_writer import DurableWriter
from .evaluation import EVALUATION_DEADLINE, WaitForChange
from .offers import Offers
from .secure_instances import SecureInstances

log = logging.getLogger(__name__)


class SecureEvaluations:
    """Evaluations of the newest committed model, as sums over clients."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, members: Membership, progress: Progress, offers: Offers,
        writer: DurableWriter, secure: SecureRounds, instances: SecureInstances,
    ) -> None:  # fmt: skip
        """``instances``: of sums of evaluations alone."""
        self._spec = spec
        self._training = training
        self._members = members
        self._progress = progress
        self._offers = offers
        self._writer = writer
        self._secure = secure
        self._instances = instances
        self._reported: set[ClientId] = set()
        self._booked = False

    def begin(self) -> None:
        """Start over with a new model."""
        self._offers.begin_model()
        self._booked = False

    def take(self, client: Client, evaluation: pb.Evaluation) -> None:
        """Refuse an evaluation in clear. Each client is reported once."""
        if client.id not in self._reported:
            self._reported.add(client.id)
            log.warning(
                "%s: its evaluation is refused: it came in clear, and with secure aggregation metrics are masked",
                client.name,
            )

    @property
    def missing(self) -> set[ClientId]:
        """Clients whose evaluation is awaited: none, as measurements arrive with the updates."""
        return set()

    async def close(self, record: RoundRecord | None, asked: set[ClientId] | None = None) -> None:
        """Add the evaluations of the newest model to the job's metrics and to ``record``, once their sum is opened.

        The mean takes the place of the value that most clients confirm, since single measurements are secret.
        """
        current = self._training.round
        if current is not None and current.sums is not None and current.base.round and not self._booked:
            self._booked = True
            await self._book(current.base, current.sums, record)

    async def _book(self, model: GlobalModel, sums: RoundSums, record: RoundRecord | None) -> None:
        means = self._progress.admit(sums.evaluation)
        metric = self._spec.objective.metric
        self._progress.take(model.round, means, means.get(metric))
        if record is not None and record.round == model.round and means:
            record.metrics.update(means)
            if metric in means:
                record.confirmed = {metric: means[metric]}
            await self._writer.record(record)
        self._progress.look_for_objective()
        if means:
            log.info("round %d: %s", model.round, ", ".join(f"{name}={value:.4f}" for name, value in means.items()))

    async def conclude(
        self, model: GlobalModel, contributors: Collection[ClientId], record: RoundRecord | None, changed: WaitForChange
    ) -> None:
        """Have the clients evaluate the final model together. If that is impossible, the job ends without it."""
        self._training.phase = pb.FederationStatus.EVALUATING
        until = time.monotonic() + EVALUATION_DEADLINE
        current = await self._instances.recovered(model, changed)
        if current is not None:
            self._training.round = current
            opened = await self._instances.settle(current, changed)
        elif self._secure.attempt:
            opened = False  # an earlier process has lost the only sum that the clients open
        else:
            current = ActiveRound(model.round + 1, time.monotonic(), until, base=model)
            self._training.round = current
            opened = await self._measured(current, until, changed)
        if opened:
            await self.close(record)
        elif any(client.evaluates for client in self._members):
            self._skip(model)
        self._instances.end_round()
        self._training.end_round()

    async def _measured(self, current: ActiveRound, until: float, changed: WaitForChange) -> bool:
        """Run instances until one is opened; return false if none can be in time."""
        evaluators = self._evaluators
        # After a restart of the aggregator, the clients need a moment to reconnect.
        settled_at = time.monotonic() + LOST_CLIENT_GRACE
        while len(self._members.trainers()) < self._spec.min_clients and time.monotonic() < settled_at:
            await changed(until=settled_at)
        while time.monotonic() < until and len(evaluators()) >= self._secure.fewest:
            if not self._instances.can_begin(evaluators()):
                await changed(until=min(self._instances.next_try, until))
                continue
            await self._instances.begin(current, evaluators)
            if await self._handed_in(current, until, changed) and await self._instances.open(current, changed):
                return True
            if self._secure.attempt:
                return False  # clients may have agreed to open the sum that was lost, and open only one
        return False

    async def _handed_in(self, current: ActiveRound, until: float, changed: WaitForChange) -> bool:
        """Wait until all clients that can have handed in; return whether these are enough."""
        while True:
            decision = self._instances.decide(current, time.monotonic())
            if decision.verdict is Verdict.COMMIT:
                current.closing = True
                return True
            if decision.verdict is not Verdict.WAIT:
                return False
            await changed(until=min(decision.recheck_at, until))

    def _evaluators(self) -> list[Client]:
        rejected = self._training.round.rejected if self._training.round is not None else set()
        return [client for client in self._members.trainers() if client.evaluates and client.id not in rejected]

    def _skip(self, model: GlobalModel) -> None:
        note = f"the final model, of round {model.round}, was not evaluated: {self._reason()}"
        log.warning("%s", note)
        self._training.warnings.append(note)

    def _reason(self) -> str:
        if self._secure.attempt:
            return self._secure.note
        ready, needed = len(self._evaluators()), self._secure.fewest
        if ready < needed:
            return f"{ready} clients with an evaluation are connected, and a sum is opened for {needed} or more"
        return self._secure.note or "too few clients have measured it in time"
