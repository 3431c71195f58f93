"""Membership of a job: its clients, their attempts and their control streams."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import last_lines, one_line

from .outbox import Outbox

ClientId = tuple[str, int]
"""(pool, index within the pool)"""

# Number of failures of a pool that the status shows.
_SHOWN_FAILURES = 5
_REMEMBERED_OFFERS = 8


@dataclass
class Client:
    """One client: a slot of a pool, whichever process currently fills it."""

    id: ClientId
    attempt: int = -1
    instance: str = ""
    evaluates: bool = False
    outbox: Outbox | None = None
    """Messages for its control stream; ``None`` while it is not connected."""
    lost_at: float = 0.0
    """Monotonic time at which its stream ended; 0 if it never had one."""
    failed: bool = False
    """True if its script raised and no newer process has connected since."""
    work: tuple[int, str] = (0, "")
    """Unfinished work when it connected: the round, and the digest of its base model."""
    trains: bool = True
    """False in a pool that only evaluates."""
    offers: dict[int, float] = field(default_factory=dict)
    """By round, monotonic time of the first offer; newest rounds only."""
    last_heard: float = 0.0
    """Monotonic time of its newest message."""
    successors: int = 0
    """Number of newer processes that wait until it has submitted its current update."""
    stage: str = ""

    @property
    def connected(self) -> bool:
        return self.outbox is not None

    @property
    def ready(self) -> bool:
        """True if it can be given work."""
        return self.connected and not self.failed

    @property
    def name(self) -> str:
        return f"{self.id[0]}/{self.id[1]}"

    def send(self, message: pb.ServerMessage) -> None:
        """Queue a message. Messages for a disconnected client are dropped; they are repeated on its return."""
        if self.outbox is not None:
            self.outbox.put_nowait(message)

    def note_offer(self, round_number: int, now: float) -> None:
        """Record an offer. For a repeated offer, the first time counts."""
        self.offers.setdefault(round_number, now)
        for old in sorted(self.offers)[:-_REMEMBERED_OFFERS]:
            del self.offers[old]

    def resumes(self, round_number: int, base_digest: str) -> bool:
        """Return whether it reported this round's work as unfinished when it connected."""
        return self.work == (round_number, base_digest)

    def since_offer(self, round_number: int, now: float) -> float:
        """Return the seconds since a round was offered; 0 if that was before a restart of the aggregator."""
        return now - self.offers.get(round_number, now)


class Refusal(Exception):
    """A hello that cannot be accepted, with the answer to the client."""

    def __init__(self, reason: "pb.Stop.Reason.ValueType", message: str) -> None:
        super().__init__(message)
        self.stop = pb.Stop(reason=reason, message=message)


@dataclass
class Membership:
    """All clients that have ever connected."""

    spec: FederatedJobSpec
    _clients: dict[ClientId, Client] = field(default_factory=dict)
    _failures: dict[str, deque[pb.ClientFailure]] = field(default_factory=dict)

    def admit(self, hello: pb.Hello) -> Client:
        """Admit a client of the job; stop an older process of the same client. Raise :class:`Refusal`.

        An attempt fences older ones only while it is connected: a made-up attempt number, or an attempt that has ended,
        does not lock out the next real one.
        """
        client_id = (hello.pool, hello.index)
        trains = self.spec.pool(hello.pool).role == "Train"
        client = self._clients.setdefault(client_id, Client(client_id, trains=trains))
        if hello.attempt < client.attempt and client.connected:
            raise Refusal(pb.Stop.FENCED, f"attempt {client.attempt} of {client.name} has taken over")
        if client.outbox is not None:
            if client.instance != hello.instance:
                message = f"a newer process (attempt {hello.attempt}) of {client.name} has taken over"
                client.send(pb.ServerMessage(stop=pb.Stop(reason=pb.Stop.FENCED, message=message)))
            client.outbox.put_nowait(None)
        client.attempt, client.instance, client.evaluates = hello.attempt, hello.instance, hello.evaluates
        client.work = (hello.round, hello.base_digest)
        client.outbox, client.failed = Outbox(), False
        client.last_heard = time.monotonic()
        return client

    def predecessor(self, hello: pb.Hello) -> Client | None:
        """Return the client if an older attempt of an HPC pool fills it now.

        In the cloud, the older attempt has ended by the time the newer one starts.
        """
        client = self._clients.get((hello.pool, hello.index))
        if client is None or not client.ready or hello.attempt <= client.attempt:
            return None
        return client if self.spec.pool(hello.pool).hpc is not None else None

    def leave(self, client: Client, outbox: Outbox) -> None:
        """Note the end of the control stream that ``outbox`` fed. A newer stream of the same client is not affected."""
        if client.outbox is outbox:
            client.outbox, client.lost_at = None, time.monotonic()

    def fail(self, client: Client, failure: pb.Failure) -> None:
        """Note that the client's script raised."""
        client.failed = True
        recent = self._failures.setdefault(client.id[0], deque(maxlen=_SHOWN_FAILURES))
        recent.append(
            pb.ClientFailure(
                index=client.id[1],
                attempt=client.attempt,
                message=one_line(failure.message, 500),
                traceback=last_lines(failure.traceback, 40, 2000),
                time=time.time(),
            )
        )

    @property
    def by_id(self) -> Mapping[ClientId, Client]:
        """All clients."""
        return self._clients

    def get(self, client_id: ClientId) -> Client | None:
        return self._clients.get(client_id)

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients.values())

    def trainers(self) -> list[Client]:
        """Return the clients that can be given a round's work, in a stable order."""
        return [client for client in self.ready() if client.trains]

    def ready(self) -> list[Client]:
        """Return the clients that can be given work, including those that only evaluate, in a stable order."""
        order = {pool.name: number for number, pool in enumerate(self.spec.pools)}
        clients = [client for client in self if client.ready]
        return sorted(clients, key=lambda client: (order[client.id[0]], client.id[1]))

    def pool_statuses(self) -> list[pb.PoolStatus]:
        """Return the counts of each pool, in the manifest's order."""
        statuses = {
            pool.name: pb.PoolStatus(name=pool.name, failures=self._failures.get(pool.name, ()))
            for pool in self.spec.pools
        }
        for client in self:
            status = statuses[client.id[0]]
            status.connected += client.ready
            status.failed += client.failed
        return list(statuses.values())
