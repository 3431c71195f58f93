"""Permissions of clients, checked for every hello and every update before it is processed.

A certificate determines which clients a caller may speak for. The rest follows from the job (pools, their sizes and
roles), from the connected clients, and from the clients that were asked.
"""

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ..clients.client_history import ClientHistory
from ..clients.membership import Client, ClientId, Membership, Refusal
from ..state.training_state import TrainingState
from . import bounds, validation
from .validation import Reason


class Permissions:
    """Permissions of one job's clients."""

    def __init__(self, job_uid: str, spec: FederatedJobSpec, members: Membership, training: TrainingState) -> None:
        self._job_uid = job_uid
        self._spec = spec
        self._members = members
        self._training = training

    def check_hello(self, hello: pb.Hello) -> None:
        """Raise :class:`Refusal` for a client that does not belong to the job."""
        if (problem := bounds.problem_with_hello(hello)) is not None:
            raise Refusal(pb.Stop.REFUSED, problem)
        if hello.job_uid != self._job_uid:
            raise Refusal(pb.Stop.REFUSED, f"this is the aggregator of job {self._job_uid}, not of {hello.job_uid}")
        if (problem := self._unknown_client(hello.pool, hello.index)) is not None:
            raise Refusal(pb.Stop.REFUSED, problem)

    def check_update(self, header: pb.UpdateHeader) -> pb.PushReply | None:
        """Return the reply to an update whose sender may not submit updates; ``None`` for a sender that may.

        Updates are accepted from the client's current process: the one that sent the last hello.
        """
        problem = self._unknown_client(header.pool, header.index)
        if header.job_uid != self._job_uid:
            problem = f"this is the aggregator of job {self._job_uid}, not of {one_line(header.job_uid, 60)}"
        elif problem is None and self._spec.pool(header.pool).role != "Train":
            problem = f"pool {header.pool} only evaluates"
        if problem is not None:
            return validation.reply(pb.PushReply.STALE, problem, Reason.NOT_SELECTED)
        client = self._members.get((header.pool, header.index))
        if client is not None and (header.attempt, header.instance) == (client.attempt, client.instance):
            return None
        if client is None or header.attempt > client.attempt:
            message = (
                "send a hello first, on a control stream"  # after a restart of the aggregator, clients need a moment
            )
            return validation.reply(pb.PushReply.RESEND, message, Reason.NOT_CONNECTED)
        return validation.reply(pb.PushReply.FENCED, "a newer process of this client has taken over")

    def may_initialize(self, client: ClientId) -> bool:
        """Return whether the client was asked for the initial weights."""
        return self._training.phase == pb.FederationStatus.INITIALIZING and self._training.initialization.asked(client)

    def was_offered(self, header: pb.UpdateHeader, history: ClientHistory) -> bool:
        """Return whether the client was selected for the update's round.

        The round is the current one or, by ``history``, an earlier one.
        """
        client_id, state = (header.pool, header.index), self._training.round
        if state is not None and header.round == state.number:
            return client_id in state.selected
        client = self._members.get(client_id)
        return header.round in history.of(client_id).offered or (
            client is not None and self.resumes(client, header.round, header.base_digest)
        )

    def resumes(self, client: Client, number: int, digest: str) -> bool:
        """Return whether a client continues work on a round that began before a restart of the aggregator.

        For any other round, the client's own statement does not count.
        """
        return client.trains and number == self._training.resumed and client.resumes(number, digest)

    def _unknown_client(self, pool_name: str, index: int) -> str | None:
        try:
            pool = self._spec.pool(pool_name)
        except KeyError:
            return f"the job has no pool {pool_name!r}"
        if index >= pool.size:
            return f"pool {pool.name} has {pool.size} clients; there is no client with index {index}"
        return None
