"""A client's part in secure aggregation, with its threads, against the server's side of the protocol in memory."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from isthmus.client.context import Context
from isthmus.client.errors import FederationError
from isthmus.client.session.audit import AuditLog
from isthmus.client.session.secure.held_update import HeldUpdate, Work
from isthmus.client.session.secure.participant import NotMaskedError, SecureParticipant
from isthmus.client.session.site_rules import SiteRules
from isthmus.secure_aggregation.client import ClientProtocol
from isthmus.secure_aggregation.encoding.scalars import SCALARS
from isthmus.secure_aggregation.layout import wire_specs
from isthmus.secure_aggregation.parameters import Outgoing, Participant, Phase
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.refusal import Refusal
from isthmus.secure_aggregation.server import ServerProtocol
from isthmus.tensors import State, allocate
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.wire.parties import Signer, Trust, issue, new_root, write_party_files

JOB, POOL, BASE = "5d2c", "pool", "ab" * 32
TRAIN, EVALUATE = sa.SecureBegin.TRAIN, sa.SecureBegin.EVALUATE
SHAPE = (300, 70)
# A deadlock fails the test after this. Seconds.
PATIENCE = 60.0


def never() -> str:
    return ""


def layout(clients: int = 8) -> sa.SecureLayout:
    return sa.SecureLayout(
        bits=32, max_clients=clients, max_examples=100,
        tensors=[sa.SecureTensor(name="weight", shape=SHAPE, clip=1.0, weighted=True)],
        scalars=[sa.SecureScalar(name="examples", least=0, most=1, weighted=True)],
    )  # fmt: skip


def begin(incarnation: int = 7, number: int = 1) -> sa.SecureBegin:
    return sa.SecureBegin(
        round=number, incarnation=incarnation, purpose=TRAIN, base_digest=BASE, layout=layout(), phase_seconds=60
    )  # fmt: skip


def update(number: int = 1, attempt: int = 0, **more: str) -> HeldUpdate:
    tensors = {
        "weight": torch.randint(-(2**24), 2**24, SHAPE, dtype=torch.int32),
        SCALARS: torch.tensor([41 << 20], dtype=torch.int64),
    }
    form = layout().SerializeToString(deterministic=True)
    return HeldUpdate(Work(TRAIN, number, attempt), more.get("base", BASE), form, tensors)


@dataclass
class World:
    """An instance's server, the client under test (index 0), and its peers, without threads."""

    directory: Path
    clients: int = 3
    trust: Mapping[str, object] = field(default_factory=dict)
    sent: "queue.Queue[sa.SecureClientMessage]" = field(default_factory=queue.Queue)
    ended: list[FederationError] = field(default_factory=list)
    refusals: list[sa.SecureRefusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        root, public = new_root()
        key, credential = issue(root, "cloud", JOB, POOL)
        trust = Trust.model_validate({"roots": {"cloud": public}, **self.trust})
        write_party_files(self.directory, key, credential, trust)
        here = Context(pool=POOL, index=0)
        self.participant = SecureParticipant(
            JOB, here, "process", self.directory, SiteRules(self.directory, AuditLog(JOB, here, "")),
            send=lambda message: self.sent.put(message.secure), end=self.ended.append,
        )  # fmt: skip
        signer, self.honest = Signer(key, credential), Trust(roots={"cloud": public})
        self.peers = {
            (POOL, index): ClientProtocol(JOB, POOL, index, 0, f"process-{index}", signer, self.honest)
            for index in range(1, self.clients)
        }
        self.server: ServerProtocol

    def start(self, of: sa.SecureBegin, unfinished: Callable[[], bool] | None = None) -> None:
        """Begin an instance, and carry it on until the masks are agreed on, or while the condition holds."""
        everyone = [Participant(POOL, 0, 0, "process")]
        everyone += [Participant(POOL, index, 0, f"process-{index}") for _, index in self.peers]
        self.server = ServerProtocol(JOB, of, everyone)
        self.carry(self.server.start(), unfinished or (lambda: self.server.phase is not Phase.COLLECT))

    def carry(self, outgoing: list[Outgoing], unfinished: Callable[[], bool]) -> None:
        """Deliver messages in both directions until there are no more, and the condition no longer holds."""
        waiting = list(outgoing)
        while waiting or unfinished():
            if waiting:
                who, message = waiting.pop(0)
                if who == (POOL, 0):
                    self.participant.receive(message)
                else:
                    try:
                        answers = self.peers[who].receive(message)
                    except Refusal as refusal:
                        answers = [refusal.answer(message.incarnation)]
                    for answer in answers:
                        waiting += self.server.receive(who, answer)
            else:
                answer = self.sent.get(timeout=PATIENCE)
                if answer.HasField("refusal"):
                    self.refusals.append(answer.refusal)
                waiting += self.server.receive((POOL, 0), answer)

    def masked(self, held: HeldUpdate, interrupted: Callable[[], str] = never) -> tuple[int, State]:
        """Return an update as the client under test sends it."""
        with self.participant.masked(held, interrupted) as masked:
            return masked.incarnation, {name: tensor.clone() for name, tensor in masked.tensors.items()}

    def masks(self, of: tuple[str, int]) -> State:
        """Return the sum of a peer's masks."""
        masks = self.peers[of].masks
        assert masks is not None
        total = {spec.name: allocate(spec).zero_() for spec in wire_specs(layout())}
        add_masks(total, masks.keys)
        return total


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.participant.close(PATIENCE)


def add(*states: State) -> State:
    total = {name: tensor.clone() for name, tensor in states[0].items()}
    for state in states[1:]:
        for name, tensor in state.items():
            total[name].add_(tensor)
    return total


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_sum_is_opened_and_nothing_else(world: World) -> None:
    held, others = update(), {of: update() for of in world.peers}
    world.start(begin())
    incarnation, first = world.masked(held)
    assert incarnation == 7 and not equal(first, held.tensors)
    vectors = [first]
    for of, other in others.items():
        world.peers[of].contributed(other.key)
        vectors.append(add(other.tensors, world.masks(of)))
    world.carry(world.server.freeze([(POOL, 0), *others]), lambda: world.server.phase is not Phase.DONE)
    total = add(*vectors)
    add_masks(total, [(key, -sign) for key, sign in world.server.plan()])
    assert equal(total, add(held.tensors, *(other.tensors for other in others.values())))


def test_two_survivors_are_too_few(world: World) -> None:
    held, contributor = update(), (POOL, 1)
    other = update()
    world.start(begin())
    world.peers[contributor].contributed(other.key)
    first, second = world.masked(held)[1], add(other.tensors, world.masks(contributor))
    # The third client hands nothing in, and two are too few.
    world.carry(world.server.freeze([(POOL, 0), contributor]), lambda: world.server.phase is not Phase.FAILED)
    assert world.server.failure
    assert not equal(add(first, second), add(held.tensors, other.tensors))
    assert not world.ended


def test_a_resent_update_has_the_same_bytes_and_a_new_instance_others(world: World) -> None:
    held = update()
    world.start(begin())
    first = world.masked(held)
    again = world.masked(held)
    assert first[0] == again[0] == 7 and equal(first[1], again[1])
    world.start(begin(incarnation=8))
    newer = world.masked(held)
    assert newer[0] == 8 and not equal(newer[1], first[1])
    assert world.participant.newer_than(7, held) and not world.participant.newer_than(8, held)


def test_masks_never_cover_two_updates(world: World) -> None:
    world.start(begin())
    world.masked(update())
    with pytest.raises(FederationError, match="cover another update already"):
        world.masked(update())


def test_memory_that_is_being_sent_is_not_reused(world: World) -> None:
    """A newer instance begins during a transfer: what is being sent must not become a sum of its masks."""
    held = update()
    world.start(begin())
    with world.participant.masked(held, never) as masked:
        before = {name: tensor.clone() for name, tensor in masked.tensors.items()}
        world.start(begin(incarnation=8))
        newer = world.participant._wait(lambda instance: instance.total, never).result(PATIENCE)
        assert equal(masked.tensors, before)
        assert {tensor.data_ptr() for tensor in masked.tensors.values()}.isdisjoint(
            tensor.data_ptr() for tensor in newer.values()
        )
    assert world.masked(held)[0] == 8


def test_an_update_from_another_model_is_refused(world: World) -> None:
    world.start(begin())
    with pytest.raises(FederationError, match=r"refused \(base\).*SHA-256 is cdcdcdcdcdcdcdcd\.\.\., not abab"):
        world.masked(update(base="cd" * 32))
    assert world.sent.get(timeout=PATIENCE).refusal.reason == "base"
    assert len(world.ended) == 1


def test_an_update_waits_for_its_own_round(world: World) -> None:
    world.start(begin())
    checked = threading.Event()
    found: list[int] = []

    def interrupted() -> str:
        checked.set()
        return ""

    waits = threading.Thread(target=lambda: found.append(world.masked(update(number=2), interrupted)[0]))
    waits.start()
    assert checked.wait(PATIENCE)
    assert not found
    world.start(begin(incarnation=9, number=2))
    waits.join(PATIENCE)
    assert found == [9]


def test_a_wait_ends_with_the_reason(world: World) -> None:
    with pytest.raises(NotMaskedError, match="the round is over"):
        world.masked(update(), lambda: "the round is over")


def test_a_wait_is_explained_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("isthmus.client.session.secure.participant._EXPLAIN_AFTER", 0.0)
    caplog.set_level("INFO", "isthmus")
    polls = iter(["", "", "", "enough"])
    with pytest.raises(NotMaskedError):
        world.masked(update(), lambda: next(polls))
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for secure aggregation: the aggregator has not begun it"
    ]


def test_too_few_parties_end_the_client(tmp_path: Path) -> None:
    world = World(tmp_path, trust={"min_parties": 2})
    world.start(begin(), lambda: not world.ended)
    with pytest.raises(FederationError, match=r"refused \(parties\)"):
        world.masked(update())
    world.participant.close(PATIENCE)


def test_a_client_of_an_unknown_root_is_left_out_or_ends_the_others(tmp_path: Path) -> None:
    """An honest aggregator begins again without it. Where it stays in, the client under test ends with the reason."""
    world = World(tmp_path, clients=4)
    other, _ = new_root()
    key, credential = issue(other, "nowhere", JOB, POOL)
    honest = world.peers.pop((POOL, 3))
    world.peers[POOL, 3] = ClientProtocol(JOB, POOL, 3, 0, "process-3", Signer(key, credential), world.honest)
    for incarnation in (7, 8):
        world.refusals.clear()
        world.start(begin(incarnation), lambda: not world.refusals)
        assert [refusal.reason for refusal in world.refusals] == ["credential"]
        assert not world.ended
    world.peers[POOL, 3] = honest
    world.start(begin(9))
    assert world.masked(update())[0] == 9
    world.peers[POOL, 3] = ClientProtocol(JOB, POOL, 3, 0, "process-3", Signer(key, credential), world.honest)
    for incarnation in (10, 11, 12):
        assert not world.ended
        world.refusals.clear()
        world.start(begin(incarnation), lambda: not world.refusals)
    with pytest.raises(FederationError, match=r"refused \(credential\): .*nowhere"):
        world.masked(update())
    world.participant.close(PATIENCE)


def test_too_few_clients_only_skip_the_instance(tmp_path: Path) -> None:
    world = World(tmp_path, trust={"min_clients": 4})
    world.start(begin(), lambda: not world.refusals)
    assert [refusal.reason for refusal in world.refusals] == ["clients"]
    assert not world.ended
    polls = iter(["", "the round goes on"])
    with pytest.raises(NotMaskedError):
        world.masked(update(), lambda: next(polls))
    world.participant.close(PATIENCE)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "signing.key").unlink()
    world.participant.receive(sa.SecureServerMessage(incarnation=7, begin=begin()))
    with pytest.raises(FederationError, match=rf"{tmp_path}/signing\.key cannot be read: No such file"):
        world.masked(update())
    assert len(world.ended) == 1
    world.participant.close(PATIENCE)


def test_a_tensor_that_must_not_leave_ends_the_client_before_it_trains(tmp_path: Path) -> None:
    world = World(tmp_path, trust={"tensors": ["head.*"]})
    world.start(begin(), lambda: not world.ended)
    assert "does not let the tensor weight leave" in str(world.ended[0])
    world.participant.close(PATIENCE)


def test_a_message_of_another_kind_does_not_stop_the_thread(world: World) -> None:
    world.participant.receive(sa.SecureServerMessage(incarnation=3))
    refusal = world.sent.get(timeout=PATIENCE)
    assert refusal.refusal.reason == "order"
    world.start(begin())
    assert world.masked(update())[0] == 7


def test_an_ended_instance_takes_nothing_more(world: World) -> None:
    world.start(begin())
    held = update()
    world.masked(held)
    world.participant.receive(sa.SecureServerMessage(incarnation=7, end=sa.SecureEnd(message="too few survivors")))
    assert world.participant._wait(lambda instance: instance.over or None, never) == "too few survivors"
    polls = iter(["", "the round goes on"])
    with pytest.raises(NotMaskedError):
        world.masked(held, lambda: next(polls))
    world.start(begin(incarnation=8))
    assert world.masked(held)[0] == 8


def test_closing_ends_the_threads(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start(begin())
    before = threading.active_count()
    world.participant.close(PATIENCE)
    names = {thread.name for thread in threading.enumerate()}
    assert threading.active_count() < before and not {"isthmus-secure", "isthmus-masks"} & names
