"""Clients that drop out in every phase, messages in any order and twice, and restarts of the server."""

import random
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st

from isthmus.secure_aggregation import graph
from isthmus.secure_aggregation.parameters import ClientId, Outgoing, Phase
from isthmus.secure_aggregation.server import ServerProtocol
from isthmus_contracts import secure_sums

from .secure_federation import Federation, begin_of, equal, random_update

STEPS = ["begin", "roster", "nonces", "shares", "push", "survivors", "consents"]


# Nonces are exchanged in sparse graphs only.
CASES = [(clients, step) for clients in (5, 16, 40) for step in STEPS
         if step != "nonces" or clients > graph.COMPLETE_UP_TO]  # fmt: skip


@pytest.mark.parametrize(("clients", "step"), CASES)
@pytest.mark.parametrize("noticed", [True, False])
def test_a_sum_is_right_after_dropouts_in_any_phase(clients: int, noticed: bool, step: str) -> None:
    """As many clients leave as may; those that leave after their push are in the sum."""
    # With a sparse graph, a neighbourhood can lose more than its part.
    leave = 4 if clients > graph.COMPLETE_UP_TO else clients - secure_sums.threshold(clients, -(-clients // 3))
    assert leave
    job = Federation.of(clients)  # of three parties
    gone = sorted(job.clients)[1 : 1 + leave]
    job.begin()
    if step in ("push", "survivors", "consents"):
        job.settle()
        if step != "push":
            job.collect()
            job.freeze()
    messages = {} if step == "push" else job.pause_before(step)
    for who in gone:
        job.kill(who, noticed)
    for who, message in messages.items():
        job.deliver(Outgoing(who, message))
    job.settle()
    if job.server.phase is Phase.COLLECT:
        job.collect()
        job.freeze()
        job.settle()
    assert job.server.phase is Phase.DONE, job.server.failure
    assert equal(job.opened(), job.expected())
    assert len(job.folded) == clients - (0 if step in ("survivors", "consents") else leave)
    assert not job.server.faults
    assert not noticed or set(gone) <= job.server.dropped.keys()


@pytest.mark.parametrize("step", ["begin", "roster", "shares", "push", "survivors", "consents"])
def test_a_sum_with_too_few_left_is_not_opened(step: str) -> None:
    job = Federation.of(6)
    gone = sorted(job.clients)[: 6 - secure_sums.threshold(6) + (2 if step == "begin" else 1)]
    job.begin(fewest=4)
    if step in ("push", "survivors", "consents"):
        job.settle()
        if step != "push":
            job.collect()
            job.freeze()
    messages = {} if step == "push" else job.pause_before(step)
    for who in gone:
        job.kill(who)
    for who, message in messages.items():
        job.deliver(Outgoing(who, message))
    job.settle()
    if job.server.phase is Phase.COLLECT:
        job.collect()
        assert job.server.shortage(job.folded)
        job.freeze()
    assert job.server.phase is Phase.FAILED
    assert job.server.failure and not job.server.waiting_for
    assert not job.server.faults
    with pytest.raises(ValueError, match="FAILED"):
        job.server.plan()
    job.settle()
    for who in job.clients.keys() - job.dead:
        assert job.clients[who].protocol.begin is None


def test_a_client_that_was_too_late_cannot_come_back() -> None:
    job = Federation.of(5)
    job.begin()
    messages = job.pause_before("roster")
    late = min(job.clients)
    for who, message in messages.items():
        if who != late:
            job.deliver(Outgoing(who, message))
    job.send(job.server.deadline())
    answers = job.clients[late].receive(messages[late])
    for answer in answers:
        assert job.server.receive(late, answer) == []
    assert not job.server.faults
    assert late not in job.server.contributors_possible
    assert job.server.resend(late) == []
    job.settle()
    assert job.clients[late].protocol.begin is None
    job.collect()
    job.freeze()
    job.settle()
    assert equal(job.opened(), job.expected())


class Chaos:
    """A federation in which everything happens in random order."""

    def __init__(self, clients: int, choices: random.Random, mishaps: float) -> None:
        self.job = Federation.of(clients, choices.randrange(1 << 30))
        self.choices = choices
        self.mishaps = mishaps
        self.attempt = 0
        self.opened: Counter[tuple[ClientId, str]] = Counter()
        self.delivered: dict[ClientId, list[Outgoing]] = defaultdict(list)
        self.journals: list[bytes] = []
        self.generator = torch.Generator().manual_seed(1)

    def run(self) -> None:
        while self.attempt < 2 and len(self.job.clients.keys() - self.job.dead) >= 3:
            self.begin()
            self.until_the_end()
            if self.job.server.phase is Phase.DONE:
                self.check_sum()
                return
            if self.job.server.survivors:
                # The sum may have been opened: all train again.
                self.attempt += 1
                for client in self.job.clients.values():
                    client.update = random_update(self.generator)

    def begin(self) -> None:
        self.journals.clear()
        self.delivered.clear()
        self.job.begin(begin_of(self.job.incarnation + 1, attempt=self.attempt))

    def until_the_end(self) -> None:
        job, choices = self.job, self.choices
        while job.server.phase not in (Phase.DONE, Phase.FAILED):
            server = job.server
            if server.phase is Phase.COLLECT:
                self.collect()
            elif job.queue:
                self.deliver()
            elif server.waiting_for:
                job.send(server.deadline())
            if choices.random() < self.mishaps:
                self.mishap()

    def deliver(self) -> None:
        """Deliver the first message to some client."""
        who = self.choices.choice([out.who for out in self.job.queue])
        out = next(out for out in self.job.queue if out.who == who)
        self.job.queue.remove(out)
        self.delivered[who].append(out)
        self.job.deliver(out)

    def collect(self) -> None:
        job = self.job
        ready = [who for who in sorted(job.server.contributors_possible - job.folded - job.dead)
                 if job.clients[who].protocol.masks is not None]  # fmt: skip
        if job.queue and (not ready or self.choices.random() < 0.7):
            self.deliver()
        elif ready and self.choices.random() < 0.9:
            job.fold(self.choices.choice(ready))
        else:
            shortage = job.server.shortage(job.folded)
            if not shortage or not ready:
                outs = job.server.freeze(job.folded)
                if job.server.phase is not Phase.FAILED:
                    self.journals.append(job.server.journal())
                job.send(outs)

    def mishap(self) -> None:
        job, choices = self.job, self.choices
        kind = choices.randrange(6)
        who = choices.choice(sorted(job.clients))
        if kind == 0 and choices.random() < 0.3:
            job.kill(who, choices.random() < 0.5)
        elif kind == 1 and self.delivered[who] and who not in job.dead:
            job.deliver(choices.choice(self.delivered[who]))
        elif kind == 2 and job.heard:
            who, message = choices.choice(job.heard)
            job.send(job.server.receive(who, message))
        elif kind == 3 and who not in job.dead:
            job.send(job.server.resend(who))
        elif kind == 4 and self.journals:
            # A restart with the journal of the freeze, or a newer one.
            self.journals.append(job.server.journal())
            job.server = ServerProtocol.restore(choices.choice(self.journals))
            job.queue.clear()
            for each in sorted(job.clients.keys() - job.dead):
                job.send(job.server.resend(each))
        elif kind == 5 and job.server.phase <= Phase.COLLECT and choices.random() < 0.3:
            self.begin()

    def check_sum(self) -> None:
        job = self.job
        assert equal(job.opened(), job.expected())
        assert job.server.survivors == job.folded
        for who in job.folded:
            self.opened[who, str(job.clients[who].update)] += 1


def check_shares(job: Federation) -> None:
    """No client gives both kinds of share for one client, and the server never holds enough of both kinds."""
    kinds: dict[tuple[ClientId, int, int], set[str]] = defaultdict(set)
    holders: dict[tuple[int, int, str], set[ClientId]] = defaultdict(set)
    for who, message in job.heard:
        for share in message.unmask.shares:
            assert bool(share.self_seed_share) != bool(share.mask_key_share)
            kind = "seed" if share.self_seed_share else "mask"
            kinds[who, message.incarnation, share.entry].add(kind)
            holders[message.incarnation, share.entry, kind].add(who)
    assert all(len(each) == 1 for each in kinds.values())
    for incarnation, entry, kind in holders:
        other = "mask" if kind == "seed" else "seed"
        assert (incarnation, entry, other) not in holders


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mishaps", [0.0, 0.1, 0.4])
def test_nothing_goes_wrong_in_a_large_federation(mishaps: float, seed: int) -> None:
    chaos = Chaos(36, random.Random(seed), mishaps)  # noqa: S311
    chaos.run()
    check_shares(chaos.job)
    assert not chaos.job.server.faults


# To shrink a failure would take minutes.
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Stage.explicit, Stage.reuse, Stage.generate],
)
@given(st.integers(3, 9), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.05, 0.2, 0.5]))
def test_nothing_goes_wrong_in_any_order(clients: int, choices: random.Random, mishaps: float) -> None:
    chaos = Chaos(clients, choices, mishaps)
    chaos.run()
    job = chaos.job
    check_shares(job)
    assert not job.server.faults
    assert all(count == 1 for count in chaos.opened.values())
    assert not [client for client in job.clients.values() if client.refusals]
    if not mishaps:
        assert job.server.phase is Phase.DONE


def test_the_server_goes_on_from_a_journal_of_every_moment() -> None:
    """The journal is taken after each message, with and without some answers lost."""
    job = Federation.of(6)
    job.begin()
    job.settle()
    job.collect(sorted(job.server.contributors_possible)[1:])
    with pytest.raises(ValueError, match="COLLECT"):
        job.server.journal()
    job.freeze()
    journals = [(job.server.phase, job.server.journal())]
    while job.queue:
        job.deliver(job.queue.popleft())
        journals.append((job.server.phase, job.server.journal()))
    assert job.server.phase is Phase.DONE
    assert {phase for phase, _ in journals} == {Phase.CONSENT, Phase.UNMASK, Phase.DONE}
    expected, plan = job.expected(), sorted(job.server.plan())
    for phase, journal in journals:
        job.server = ServerProtocol.restore(journal)
        assert job.server.phase is phase
        assert job.server.journal() == journal
        for who in sorted(job.clients):
            job.send(job.server.resend(who))
        job.settle()
        assert job.server.phase is Phase.DONE, job.server.failure
        assert sorted(job.server.plan()) == plan
        assert equal(job.opened(), expected)
        assert not job.server.faults
        assert not [client for client in job.clients.values() if client.refusals]
