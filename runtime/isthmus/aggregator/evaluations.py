"""What the clients measure of committed models on data of their own."""

import logging
import time
from collections.abc import Awaitable, Collection
from typing import Protocol

from isthmus_contracts.federatedjob import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from .checkpoints import RoundRecord
from .course import Course
from .decisions import LOST_CLIENT_GRACE
from .membership import Client, ClientId, Membership
from .offers import Offers
from .progress import Progress, WeightedMeans
from .statewriter import StateWriter

log = logging.getLogger(__name__)

# The clients' last measurement, of the final model, may take this long. Seconds.
EVALUATION_DEADLINE = 300.0


class Changed(Protocol):
    """Waits for a change, or until the given time (monotonic seconds)."""

    def __call__(self, until: float | None = None) -> Awaitable[None]: ...


class Evaluations:
    """Of one model at a time, the newest."""

    def __init__(
        self, spec: FederatedJobSpec, course: Course, members: Membership, progress: Progress, offers: Offers,
        writer: StateWriter,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._course = course
        self._members = members
        self._progress = progress
        self._offers = offers
        self._writer = writer
        self._means = WeightedMeans()

    def begin(self) -> None:
        """There is a new model."""
        self._means = WeightedMeans()

    def take(self, client: Client, evaluation: pb.Evaluation) -> None:
        """What a client has measured."""
        course = self._course
        if course.model is None or evaluation.model_digest != course.model.digest:
            return
        self._means.add(client.id, evaluation.num_examples, evaluation.metrics)
        waited_for, heard = course.round.selected if course.round else set(), self._means.clients()
        if client.id in waited_for and all(
            member.id in heard for member in self._members if member.evaluates and member.id in waited_for
        ):
            self._progress.take(course.model.round, self._progress.admit(self._means.means()))
        course.changes.ring()

    async def close(self, record: RoundRecord | None) -> None:
        """Books what was measured of the model, also in its own round's record."""
        model = self._course.model
        if model is None or not (means := self._progress.admit(self._means.means())):
            return
        self._progress.take(model.round, means)
        if record is not None and record.round == model.round:
            record.metrics.update(means)
            await self._writer.record(record)
        log.info("round %d: %s", model.round, ", ".join(f"{name}={value:.4f}" for name, value in means.items()))

    async def conclude(self, contributors: Collection[ClientId], record: RoundRecord | None, changed: Changed) -> None:
        """The clients measure the final model, to which ``contributors`` gave the last updates."""
        assert self._course.model is not None
        self._course.phase = pb.FederationStatus.EVALUATING
        offered: set[ClientId] = set()
        started = time.monotonic()
        until = started + EVALUATION_DEADLINE
        while time.monotonic() < until:
            evaluators = [client for client in self._members.ready() if client.evaluates]
            for client in evaluators:
                if client.id not in offered:
                    offered.add(client.id)
                    self._offers.evaluate(client)
            # After a restart of ours, the clients need a moment to come back.
            all_back = len(self._members.trainers()) >= self._spec.min_clients
            settled_at = started if all_back else started + LOST_CLIENT_GRACE
            if time.monotonic() < settled_at:
                await changed(until=settled_at)
            elif _awaited(evaluators, contributors) <= self._means.clients():
                break
            else:
                await changed(until=until)
        await self.close(record)


def _awaited(evaluators: list[Client], contributors: Collection[ClientId]) -> set[ClientId]:
    """Whose evaluation of the final model is waited for: a straggler may be at an earlier round for long."""
    waited_for = {client.id for client in evaluators if client.id in contributors or not client.trains}
    return waited_for or {client.id for client in evaluators}
