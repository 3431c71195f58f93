"""Control sessions of clients: hello, handover between attempts, messages, end."""

import asyncio
import logging
import time

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ..clients.membership import Client, Membership
from ..clients.outbox import Outbox
from ..job import Job
from ..model import messages
from ..secure.rounds import SecureRounds
from ..state.training_state import ActiveRound, TrainingState
from ..updates.permissions import Permissions
from .evaluation import ModelEvaluations
from .offers import Offers

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
# An attempt that has been silent for this long is no longer waited for in a handover. Seconds: three heartbeats.
SILENCE = 30.0
_POLL_SECONDS = 0.2


class ClientSessions:
    """Handler of the control streams of all clients."""

    def __init__(
        self, job: Job, instance: str, training: TrainingState, members: Membership, permissions: Permissions,
        offers: Offers, evaluations: ModelEvaluations, secure: SecureRounds | None = None,
    ) -> None:  # fmt: skip
        """``instance``: identity of this process. ``secure``: if the job uses secure aggregation."""
        self._spec = job.spec
        self._instance = instance
        self._training = training
        self._members = members
        self._permissions = permissions
        self._offers = offers
        self._evaluations = evaluations
        self._secure = secure

    def check_hello(self, hello: pb.Hello) -> None:
        """Raise :class:`~..clients.membership.Refusal` for a client that does not belong to the job."""
        self._permissions.check_hello(hello)

    async def wait_for_handover(self, hello: pb.Hello) -> None:
        """Wait until a newly started process may take over from the client's older attempt.

        The next attempt of an HPC pool may start before the time limit ends the current one, which then submits the
        update that it is computing first.
        """
        client, current = self._members.predecessor(hello), self._training.round
        if client is None or current is None:
            return
        client.successors += 1
        try:
            while client is self._members.predecessor(hello) and self._is_training(client, current):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_SECONDS)  # silence also ends the wait, and sends no notification
        except asyncio.CancelledError:
            if client.successors == 1 and client.connected:
                # The new attempt disappeared: send the old one the offer that was withheld from it.
                client.successors = 0
                self._repeat_offer(client)
                client.successors = 1
            raise
        finally:
            client.successors -= 1

    def _is_training(self, client: Client, current: ActiveRound) -> bool:
        """Return whether the client is expected to submit an update of that round, or to help to open its sum."""
        pending = client.id in current.selected - current.accepted - current.rejected
        pending |= self._secure is not None and self._secure.needs(client)
        return self._training.round is current and pending and time.monotonic() - client.last_heard <= SILENCE

    def join(self, hello: pb.Hello) -> Client:
        """Admit a client and send it what applies to it now. Raise :class:`~..clients.membership.Refusal`."""
        self.check_hello(hello)
        client = self._members.admit(hello)
        client.send(messages.welcome(HEARTBEAT_SECONDS, self._spec.rounds, self._instance))
        model = self._training.model
        if model is not None:
            client.send(messages.committed(model.round))
            self._offers.evaluate_only(client, model)
        match self._training.phase:
            case pb.FederationStatus.COMPLETE:
                client.send(messages.stop(pb.Stop.COMPLETE, "training is complete"))
            case pb.FederationStatus.INITIALIZING if self._training.initialization.asked(client.id):
                client.send(messages.INITIALIZE)
            case pb.FederationStatus.EVALUATING if client.evaluates and model is not None:
                if self._secure is None or self._secure.takes_part(client):
                    self._offers.evaluate(client, model)
            case _:
                self._repeat_offer(client)
        if self._secure is not None:
            self._secure.joined(client)
        log.info("%s joined (attempt %d)", client.name, client.attempt)
        self._training.changes.notify()
        return client

    def _repeat_offer(self, client: Client) -> None:
        """Repeat the offer that a client had before its connection, or an earlier aggregator process, ended."""
        current = self._training.round
        if current is None or current.closing:
            return
        if self._secure is not None and not self._secure.takes_part(client):
            return  # it cannot join the instance; the next one may include it
        if self._permissions.resumes(client, current.number, current.base.digest):
            current.selected.add(client.id)
        if client.id in current.selected - current.accepted - current.rejected:
            self._offers.train(client, current)

    def leave(self, client: Client, outbox: Outbox) -> None:
        """Note that a control stream has ended."""
        self._members.leave(client, outbox)
        log.info("%s disconnected", client.name)
        if self._secure is not None:
            self._secure.lost()
        self._training.changes.notify()

    def receive(self, client: Client, message: pb.ClientMessage) -> None:
        """Handle a message that follows the hello."""
        client.last_heard = time.monotonic()
        match message.WhichOneof("message"):
            case "heartbeat":
                client.stage = one_line(message.heartbeat.stage, 32)
            case "evaluation":
                self._evaluations.take(client, message.evaluation)
            case "failure" if not client.failed:  # a client fails once: repeated reports must not fill the log
                self._members.fail(client, message.failure)
                log.warning("%s failed: %s", client.name, one_line(message.failure.message))
                if self._secure is not None:
                    self._secure.lost()
                self._training.changes.notify()
            case "secure" if self._secure is not None:
                self._secure.receive(client, message.secure)
            case "leaving":
                log.info("%s leaves: %s", client.name, one_line(message.leaving.reason))
