"""A federation in memory that runs secure aggregation: clients, a server, and the masked sum between them."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from isthmus.secure_aggregation.client import ClientProtocol
from isthmus.secure_aggregation.parameters import ClientId, Outgoing, Participant, Phase, UpdateKey
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.refusal import Refusal
from isthmus.secure_aggregation.server import ServerProtocol
from isthmus.tensors import State
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire import parties
from isthmus_contracts.wire.parties import Credential, Signer, Trust

JOB = "0b7c1c1e-90f1-4d8f-a0b5-0d2c3a4f5e6d"
BASE = "ab" * 32
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "w": ((7,), torch.int32), "isthmus.scalars": ((3,), torch.int64)
}  # fmt: skip


@dataclass(frozen=True)
class Party:
    """A party with its root, and its pools' signing keys for the job."""

    name: str
    root: bytes
    public: str
    keys: dict[str, tuple[bytes, Credential]]

    @classmethod
    def make(cls, name: str, pools: Iterable[str], job_uid: str = JOB) -> "Party":
        root, public = parties.new_root()
        return cls(name, root, public, {pool: parties.issue(root, name, job_uid, pool) for pool in pools})

    def signer(self, pool: str) -> Signer:
        return Signer(*self.keys[pool])


def make_parties(*names: str) -> list[Party]:
    """Return parties with one pool each, of the same name."""
    return [Party.make(name, [name]) for name in names]


def trust_in(some: Iterable[Party], min_parties: int = 1, min_clients: int = 3) -> Trust:
    return Trust(roots={each.name: each.public for each in some}, min_parties=min_parties, min_clients=min_clients)


def begin_of(incarnation: int, round: int = 1, **fields: object) -> pb.SecureBegin:
    layout = pb.SecureLayout(
        bits=32, max_clients=1000, max_examples=100, public_seed=b"seed",
        tensors=[pb.SecureTensor(name="w", shape=[7], clip=1.0)],
        scalars=[pb.SecureScalar(name="loss", least=0, most=10)],
    )  # fmt: skip
    values: dict[str, object] = {
        "round": round, "incarnation": incarnation, "purpose": pb.SecureBegin.TRAIN, "base_digest": BASE,
        "layout": layout, "phase_seconds": 60,
    }  # fmt: skip
    return pb.SecureBegin(**(values | fields))  # type: ignore[arg-type]


@dataclass
class Client:
    """A client with an update that it holds."""

    id: ClientId
    protocol: ClientProtocol
    update: State
    refusals: list[Refusal] = field(default_factory=list)
    pushed: dict[int, State] = field(default_factory=dict)
    """By incarnation, the masked update."""
    used: dict[bytes, str] = field(default_factory=dict)
    """By key of a mask, the update that it has covered."""

    @property
    def participant(self) -> Participant:
        return Participant(*self.id, attempt=1, instance="i")

    def receive(self, message: pb.SecureServerMessage) -> list[pb.SecureClientMessage]:
        try:
            return self.protocol.receive(message)
        except Refusal as refusal:
            self.refusals.append(refusal)
            return [refusal.answer(message.incarnation)]

    def key(self) -> UpdateKey:
        begin = self.protocol.begin
        assert begin is not None
        return UpdateKey(begin.round, begin.base_digest, begin.attempt, str(self.update))

    def push(self) -> State:
        """Mask the update for the present instance."""
        masks, begin = self.protocol.masks, self.protocol.begin
        assert masks is not None and begin is not None
        self.protocol.contributed(self.key())
        for key, _ in masks.keys:
            assert self.used.setdefault(key, str(self.update)) == str(self.update), "a mask covers two updates"
        masked = {name: tensor.clone() for name, tensor in self.update.items()}
        add_masks(masked, masks.keys)
        self.pushed[begin.incarnation] = masked
        return masked


def random_update(generator: torch.Generator) -> State:
    return {
        name: torch.randint(-1000, 1000, shape, dtype=dtype, generator=generator)
        for name, (shape, dtype) in SHAPES.items()
    }


def sum_of(updates: Iterable[State]) -> State:
    """Add updates as the ring does."""
    total = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in SHAPES.items()}
    for update in updates:
        for name, tensor in update.items():
            total[name] += tensor
    return total


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Federation:
    """Clients and the server of one job; messages are queued and delivered one by one."""

    def __init__(self, places: Iterable[tuple[Party, int]], trust: Trust, seed: int = 0) -> None:
        """``places``: the party (its first pool) and the index of each client."""
        generator = torch.Generator().manual_seed(seed)
        places = list(places)
        self.parties = {party.name: party for party, _ in places}
        self.clients: dict[ClientId, Client] = {}
        for party, index in places:
            pool = next(iter(party.keys))
            protocol = ClientProtocol(JOB, pool, index, 1, "i", party.signer(pool), trust)
            self.clients[pool, index] = Client((pool, index), protocol, random_update(generator))
        self.incarnation = 0
        self.server: ServerProtocol
        self.queue: deque[Outgoing] = deque()
        self.dead: set[ClientId] = set()
        self.total: State = {}
        self.folded: set[ClientId] = set()
        self.heard: list[tuple[ClientId, pb.SecureClientMessage]] = []
        """All that the server received."""

    @classmethod
    def of(cls, clients: int, seed: int = 0) -> "Federation":
        """Return a federation of three parties with about as many clients each."""
        some = make_parties("cloud", "east", "west")
        return cls([(some[number % 3], number // 3) for number in range(clients)], trust_in(some), seed)

    def begin(
        self, begin: pb.SecureBegin | None = None, among: Collection[ClientId] | None = None, **kwargs: int
    ) -> None:
        """Start an instance among living clients, or some of them."""
        self.incarnation += 1
        begin = begin_of(self.incarnation) if begin is None else begin
        chosen = [client.participant for who, client in self.clients.items()
                  if who not in self.dead and (among is None or who in among)]  # fmt: skip
        self.server = ServerProtocol(JOB, begin, chosen, **kwargs)  # type: ignore[arg-type]
        self.queue.clear()
        self.total, self.folded = sum_of([]), set()
        self.send(self.server.start())

    def send(self, outs: Iterable[Outgoing]) -> None:
        self.queue.extend(outs)

    def deliver(self, out: Outgoing) -> None:
        """Deliver a message, and the client's answers to it."""
        if out.who not in self.dead:
            for answer in self.clients[out.who].receive(out.message):
                self.answer(out.who, answer)

    def answer(self, who: ClientId, message: pb.SecureClientMessage) -> None:
        # Through bytes, as on the wire.
        message = pb.SecureClientMessage.FromString(message.SerializeToString())
        self.heard.append((who, message))
        self.send(self.server.receive(who, message))

    def pause_before(self, step: str) -> dict[ClientId, pb.SecureServerMessage]:
        """Deliver messages until only those of a step are left; return these instead of delivering them."""
        waiting: deque[Outgoing] = deque()
        while self.queue:
            out = self.queue.popleft()
            if out.message.WhichOneof("step") == step:
                waiting.append(out)
            else:
                self.deliver(out)
        copies = {out.who: pb.SecureServerMessage() for out in waiting}
        for out in waiting:
            copies[out.who].CopyFrom(out.message)
        return copies

    def settle(self) -> None:
        """Deliver messages until none is left; a phase that then waits for somebody reaches its deadline."""
        while True:
            while self.queue:
                self.deliver(self.queue.popleft())
            if not self.server.waiting_for or self.server.phase in (Phase.DONE, Phase.FAILED, Phase.COLLECT):
                return
            self.send(self.server.deadline())

    def kill(self, who: ClientId, noticed: bool = True) -> None:
        self.dead.add(who)
        if noticed:
            self.send(self.server.drop(who, "it is gone"))

    def collect(self, among: Iterable[ClientId] | None = None) -> None:
        """Take the updates of the clients that can contribute, or some of them."""
        for who in sorted(self.server.contributors_possible if among is None else among):
            if who not in self.dead:
                self.fold(who)

    def fold(self, who: ClientId) -> None:
        for name, tensor in self.clients[who].push().items():
            self.total[name] += tensor
        self.folded.add(who)

    def freeze(self) -> None:
        self.send(self.server.freeze(self.folded))

    def opened(self) -> State:
        """Return the sum without masks."""
        total = {name: tensor.clone() for name, tensor in self.total.items()}
        add_masks(total, [(key, -sign) for key, sign in self.server.plan()])
        return total

    def expected(self) -> State:
        return sum_of(self.clients[who].update for who in self.folded)

    def run(self) -> None:
        """Run a whole instance."""
        self.begin()
        self.settle()
        self.collect()
        self.freeze()
        self.settle()
