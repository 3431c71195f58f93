"""Evaluation of committed models by clients, on their own data."""

import logging
import math
import time
from collections.abc import Awaitable, Collection
from typing import Protocol

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ... import metric_names
from ...framing import MAX_EXAMPLES
from ..clients.membership import Client, ClientId, Membership
from ..model.global_model import GlobalModel
from ..state.confirmation import ClientMeasurements
from ..state.metrics_by_round import Progress, WeightedMeans
from ..state.round_decision import LOST_CLIENT_GRACE
from ..state.training_state import TrainingState
from ..storage.round_record import RoundRecord
from .durable_writer import DurableWriter
from .offers import Offers

log = logging.getLogger(__name__)

# Longest time that the evaluation of the final model may take. Seconds.
EVALUATION_DEADLINE = 300.0
_LEFT_OUT = "%s: its evaluation of round %d is left out: %s"


class WaitForChange(Protocol):
    """Callable that waits for a change, or until the given time (monotonic seconds)."""

    def __call__(self, until: float | None = None) -> Awaitable[None]: ...


class ModelEvaluations(Protocol):
    """Evaluations of the newest committed model, in clear or as masked sums."""

    def begin(self) -> None: ...
    def take(self, client: Client, evaluation: pb.Evaluation) -> None: ...
    @property
    def missing(self) -> set[ClientId]: ...
    async def close(self, record: RoundRecord | None, asked: set[ClientId] | None = None) -> None: ...
    async def conclude(
        self, model: GlobalModel, contributors: Collection[ClientId], record: RoundRecord | None, changed: WaitForChange
    ) -> None: ...


class Evaluations:
    """Evaluations of the newest committed model."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, members: Membership, progress: Progress, offers: Offers,
        writer: DurableWriter,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._training = training
        self._members = members
        self._progress = progress
        self._offers = offers
        self._writer = writer
        self._measurements = ClientMeasurements(spec.objective, spec.folds_late)
        self.begin()

    def begin(self) -> None:
        """Start over with a new model."""
        self._means = WeightedMeans(self._spec.strategy.one_update_per_client)
        self._refused: set[ClientId] = set()
        self._unasked: set[ClientId] = set()
        self._booked = 0
        self._offers.begin_model()

    def take(self, client: Client, evaluation: pb.Evaluation) -> None:
        """Record a client's evaluation, once, if the client was asked for it."""
        model = self._training.model
        if model is None or not model.round or evaluation.model_digest != model.digest:
            return
        if client.id in self._means.clients() or client.id in self._refused:
            return
        if not client.evaluates or client.id not in self._offers.offered:
            # This may be an honest client that was asked by an aggregator process that was killed. It will be asked
            # again in a moment.
            if client.id not in self._unasked:
                log.warning(_LEFT_OUT, client.name, model.round, "this client was not asked for it")
            self._unasked.add(client.id)
            return
        if problem := _problem(evaluation):
            self._refused.add(client.id)
            log.warning(_LEFT_OUT, client.name, model.round, problem)
        else:
            self._means.add(client.id, evaluation.num_examples, evaluation.metrics)
        if not self.missing and len(self._means):
            means = self._progress.admit(self._means.means())
            self._progress.take(model.round, means, self._confirmed(self._asked()))
            self._progress.look_for_objective()
        self._training.changes.notify()

    @property
    def missing(self) -> set[ClientId]:
        """Connected clients that were asked for an evaluation and have not sent it.

        Empty for the initial model, which is not evaluated.
        """
        if self._training.model is None or not self._training.model.round:
            return set()
        asked = {client.id for client in self._members.ready() if client.evaluates} & self._offers.offered
        return asked - self._means.clients() - self._refused

    def _asked(self) -> set[ClientId]:
        return {client.id for client in self._members if client.evaluates and client.id in self._offers.offered}

    def _confirmed(self, asked: set[ClientId]) -> float | None:
        """Return the lower bound of the objective's metric that most of the ``asked`` clients confirm."""
        metric = self._spec.objective.metric
        mean = self._means.means().get(metric)
        present = {client.id for client in self._members.ready() if client.evaluates}
        return self._measurements.confirmed(self._means, (metric,), mean, asked, present)

    async def close(self, record: RoundRecord | None, asked: set[ClientId] | None = None) -> None:
        """Add the evaluations of the newest model to the job's metrics and to ``record``, the record of its round.

        ``asked``: the clients whose evaluations were awaited. Default: all clients that were asked.
        """
        model = self._training.model
        if model is None or not model.round:
            return
        if len(self._means) == self._booked:
            self._progress.look_for_objective()
            return
        self._booked = len(self._means)
        means = self._progress.admit(self._means.means())
        confirmation = self._confirmed(self._asked() if asked is None else asked)
        self._progress.take(model.round, means, confirmation)
        if record is not None and record.round == model.round:
            record.metrics.update(means)
            if (metric := self._spec.objective.metric) in means:
                record.confirmed = {} if confirmation is None else {metric: confirmation}
            await self._writer.record(record)
        self._progress.look_for_objective()
        log.info("round %d: %s", model.round, ", ".join(f"{name}={value:.4f}" for name, value in means.items()))

    async def conclude(
        self, model: GlobalModel, contributors: Collection[ClientId], record: RoundRecord | None, changed: WaitForChange
    ) -> None:
        """Have the clients evaluate the final model, whose last updates came from ``contributors``."""
        self._training.phase = pb.FederationStatus.EVALUATING
        offered: set[ClientId] = set()
        started = time.monotonic()
        until = started + EVALUATION_DEADLINE
        awaited: set[ClientId] = set()
        while time.monotonic() < until:
            evaluators = [client for client in self._members.ready() if client.evaluates]
            awaited = _awaited(evaluators, contributors)
            for client in evaluators:
                if client.id not in offered:
                    offered.add(client.id)
                    self._offers.evaluate(client, model)
            # After a restart of the aggregator, the clients need a moment to reconnect.
            all_back = len(self._members.trainers()) >= self._spec.min_clients
            settled_at = started if all_back else started + LOST_CLIENT_GRACE
            if time.monotonic() < settled_at:
                await changed(until=settled_at)
            elif awaited <= self._means.clients() | self._refused:
                break
            else:
                await changed(until=until)
        await self.close(record, awaited)


def _problem(evaluation: pb.Evaluation) -> str | None:
    """Return the reason why an evaluation is invalid, in one line; ``None`` if it is valid."""
    examples = evaluation.num_examples
    if not (math.isfinite(examples) and 0 <= examples <= MAX_EXAMPLES):
        return f"num_examples must be from 0 to 2**53, not {examples:g}"
    return metric_names.problem_with(evaluation.metrics)


def _awaited(evaluators: list[Client], contributors: Collection[ClientId]) -> set[ClientId]:
    """Return the clients whose final evaluation is awaited; stragglers may still be training an earlier round."""
    waited_for = {client.id for client in evaluators if client.id in contributors or not client.trains}
    return waited_for or {client.id for client in evaluators}
