"""Clients that spoil instances of secure aggregation: they stay out of the round, and the others go on."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from isthmus.aggregator.secure.exclusions import Exclusions
from isthmus.secure_aggregation.client import ClientProtocol
from isthmus.secure_aggregation.refusal import Reason
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.wire.parties import Signer, issue, new_root

from .trial import POOL, UID, InProcess, SecureTrial

HONEST = 5
ROGUE = (POOL, HONEST)


class Rogue(InProcess):
    """Client whose credential is of a root of its own. Each time that it is left out it comes back as a new process."""

    def __init__(self, trial: SecureTrial, attempt: int = 0) -> None:
        super().__init__(trial, HONEST, attempt)
        root, _ = new_root()
        signer = Signer(*issue(root, "cloud", UID, POOL))
        self.protocol = ClientProtocol(UID, POOL, HONEST, attempt, self.name, signer, trial.trust)
        self.protocol._credentials.verify = lambda *_: None  # type: ignore[method-assign]
        self.successor: Rogue | None = None

    async def _step(self, member: Any, message: sa.SecureServerMessage) -> None:
        await super()._step(member, message)
        if message.HasField("end") and self.successor is None:
            self.successor = Rogue(self.trial, self.attempt + 1)
            self.trial.clients.append(self.successor)
            self.successor.connect()


@pytest.fixture
async def trials(tmp_path: Any) -> Any:
    made: list[SecureTrial] = []

    def make(**changes: Any) -> SecureTrial:
        trial = SecureTrial(tmp_path / f"state{len(made)}", HONEST + 1, **changes)
        trial.clients[HONEST] = Rogue(trial)
        made.append(trial)
        return trial

    yield make
    for trial in made:
        trial.close()


def processes_of_the_rogue(trial: SecureTrial) -> list[Rogue]:
    return [client for client in trial.clients if isinstance(client, Rogue)]


async def test_a_forged_credential_spoils_one_instance(trials: Callable[..., SecureTrial]) -> None:
    trial = trials(stragglers={"minUpdates": HONEST})
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    honest = trial.clients[:HONEST]
    assert [[refusal.reason for refusal in client.refusals] for client in honest] == [[Reason.CREDENTIAL]] * HONEST
    assert trial.store.records()[0].updates == HONEST
    assert all(client.trained == [(1, 0)] for client in honest)
    assert len(processes_of_the_rogue(trial)) >= 2


async def test_it_stays_out_when_the_deadline_is_extended(trials: Callable[..., SecureTrial]) -> None:
    trial = trials(stragglers={"minUpdates": HONEST, "roundDeadlineSeconds": 1})
    trial.clients[0].mute.add("push")
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.submitted == HONEST - 1)
    first = trial.clients[1].protocol.seen
    await trial.until(lambda: trial.clients[1].protocol.seen > first)  # the deadline has passed
    trial.clients[0].mute.clear()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert [len(client.refusals) for client in trial.clients[:HONEST]] == [1] * HONEST
    assert trial.store.records()[0].updates == HONEST


async def test_no_other_instance_begins_before_most_have_named_the_culprit(trials: Callable[..., SecureTrial]) -> None:
    """After two refusals, the five updates that six clients need are impossible. The four that are left would suffice
    for another instance, but they include the culprit."""
    trial = trials(selection={"minClients": 4}, stragglers={"minUpdates": 3})
    slow = trial.clients[2:HONEST]
    for client in slow:
        client.mute.add("refusal")
    trial.connect()
    trial.start()
    await trial.until(lambda: trial.aggregator.training.round is not None)
    current = trial.aggregator.training.round
    assert current is not None
    await trial.until(lambda: len(current.rejected) == 2)
    first = trial.clients[0].protocol.seen
    await trial.until(lambda: all(client.refusals for client in slow))
    for _ in range(20):  # the coordinator decides
        trial.aggregator.training.changes.notify()
        await asyncio.sleep(0)
    assert not current.closing
    for client in slow:
        assert client.protocol.seen == first
        client.mute.clear()
        member = trial.aggregator.members.get((POOL, client.index))
        assert member is not None
        answer = client.refusals[0].answer(first)
        trial.aggregator.sessions.receive(member, pb.ClientMessage(secure=answer))
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert [len(client.refusals) for client in trial.clients[:HONEST]] == [1] * HONEST


async def test_it_may_try_again_in_the_next_round(trials: Callable[..., SecureTrial]) -> None:
    trial = trials(rounds=2, stragglers={"minUpdates": HONEST})
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.completed_rounds == 2)
    assert all(1 <= len(client.refusals) <= 2 for client in trial.clients[:HONEST])


def test_only_refusers_are_pardoned() -> None:
    excluded = Exclusions()
    first, second, culprit, invalid = (("a", index) for index in range(4))
    for client in (first, second, culprit):
        excluded.add(client, culprit=client == culprit)
    excluded.add(culprit, culprit=False)  # it has refused, too
    rejected = {first, second, culprit, invalid}
    excluded.pardon(rejected, [first, culprit])
    assert rejected == {second, culprit, invalid}
    excluded.pardon(rejected)
    assert rejected == {culprit, invalid}
    excluded.pardon_all(rejected)
    assert rejected == {culprit}
    excluded.clear()
    excluded.pardon_all(rejected)
    assert rejected == set()
