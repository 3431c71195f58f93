"""Rounds of secure aggregation in one process: what is summed, what survives, and what is done again."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.aggregator.secure import instance as instances
from isthmus.aggregator.secure.journal import JournalFile
from isthmus.aggregator.state import round_decision
from isthmus.strategies import StrategyError
from isthmus.tensors import State
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from .trial import InProcess, SecureTrial

CLIENTS = 4


@pytest.fixture
async def trials(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[SecureTrial] = []

    def make(clients: int = CLIENTS, rounds: int = 1, **changes: Any) -> SecureTrial:
        made.append(SecureTrial(tmp_path / f"state{len(made)}", clients, rounds, **changes))
        return made[-1]

    yield make
    for trial in made:
        trial.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give lost clients up at once."""
    for module in (instances, round_decision):
        monkeypatch.setattr(module, "LOST_CLIENT_GRACE", 0.05)


def mean_of(clients: list[InProcess]) -> float:
    weights = [client.index + 1 for client in clients]
    return sum(weight * weight / 8 for weight in weights) / sum(weights)


def model(trial: SecureTrial, number: int) -> State:
    return trial.store.load(number).state


def assert_mean(trial: SecureTrial, clients: list[InProcess], number: int = 1) -> None:
    change = model(trial, number)["w"] - model(trial, number - 1)["w"]
    torch.testing.assert_close(change, torch.full((40,), mean_of(clients)), rtol=0, atol=1e-5)
    assert int(model(trial, number)["n"]) == int(model(trial, number - 1)["n"]) + 3


async def test_the_mean_of_masked_updates(trials: Any) -> None:
    trial = trials(rounds=2)
    trial.start()
    trial.connect()
    await trial.complete()
    for number in (1, 2):
        assert_mean(trial, trial.clients, number)
    records = trial.store.records()
    assert [(record.updates, record.examples) for record in records] == [(4, 10), (4, 10)]
    assert [record.secure["dropouts"] for record in records] == [0, 0]
    weights = [client.index + 1 for client in trial.clients]
    score = sum(client.index * weight for client, weight in zip(trial.clients, weights, strict=True)) / sum(weights)
    # Both models are evaluated: the first by the second round's clients, the last by an instance of its own.
    assert [record.metrics["score"] for record in records] == pytest.approx([score, score], abs=1e-3)
    assert trial.status.phase == pb.FederationStatus.COMPLETE
    assert (trial.status.secure.survivors, trial.status.secure.parties) == (4, 1)
    assert all(client.trained == [(1, 0), (2, 0)] for client in trial.clients)


@pytest.mark.parametrize("step", ["advertise", "shares", "consent", "unmask"])
async def test_a_silent_client_is_left_out_at_the_deadline(trials: Any, step: str) -> None:
    trial = trials(5, secure={"phaseDeadlineSeconds": 1}, stragglers={"minUpdates": 4})
    trial.clients[4].mute.add(step)
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    contributors = trial.clients[:4] if step in ("advertise", "shares") else trial.clients
    assert_mean(trial, contributors)
    assert trial.status.secure.dropouts == 5 - len(contributors)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("step", ["advertise", "shares", "push", "consent", "unmask"])
async def test_a_lost_client_is_not_waited_for(trials: Any, step: str) -> None:
    trial = trials(5, secure={"phaseDeadlineSeconds": 3600}, stragglers={"minUpdates": 4})
    victim = trial.clients[4]
    victim.mute.add(step)
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.aggregator.training.round is not None and victim.protocol.begin is not None)
    await asyncio.sleep(0)
    victim.disconnect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert trial.status.secure.survivors in (4, 5)


async def test_a_newer_process_cannot_join(trials: Any) -> None:
    """Its predecessor counts as a dropout, and the newer process takes part in the next round."""
    trial = trials(5, rounds=2, secure={"phaseDeadlineSeconds": 3600}, stragglers={"minUpdates": 4})
    old = trial.clients[4]
    old.mute.add("push")
    trial.start()
    trial.connect()
    await trial.until(lambda: old.protocol.masks is not None)
    new = trial.clients[4] = InProcess(trial, 4, attempt=1)
    new.connect()
    await trial.complete()
    assert new.trained == [(2, 0)]
    assert_mean(trial, trial.clients[:4], 1)
    assert_mean(trial, trial.clients, 2)


async def test_a_client_that_reconnects_gets_all_messages_again(trials: Any) -> None:
    trial = trials(secure={"phaseDeadlineSeconds": 3600})
    away = trial.clients[3]
    away.mute.add("shares")
    trial.start()
    trial.connect()
    await trial.until(lambda: away.protocol.begin is not None and trial.clients[0].protocol.begin is not None)
    away.disconnect()
    away.mute.clear()
    away.connect()
    await trial.complete()
    assert_mean(trial, trial.clients)
    assert all(len(client.sent) == 2 for client in trial.clients)  # the round's instance, and the evaluation's


async def test_a_crash_before_the_survivors_are_fixed_costs_no_training(trials: Any) -> None:
    trial = trials()
    trial.clients[3].mute.add("push")
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.submitted == 3)
    first = trial.clients[0].protocol.seen
    await trial.crash()
    trial.clients[3].mute.clear()
    trial.start()
    trial.connect()
    await trial.complete()
    assert_mean(trial, trial.clients)
    for client in trial.clients:
        assert client.trained == [(1, 0)]
        assert client.protocol.seen > first
        assert all(len(sums) == 1 for sums in client.sent.values())


@pytest.mark.parametrize("step", ["consent", "unmask"])
async def test_a_crash_after_that_goes_on_with_the_same_instance(trials: Any, step: str) -> None:
    trial = trials(secure={"phaseDeadlineSeconds": 3600})
    for client in trial.clients[2:]:
        client.mute.add(step)
    trial.start()
    trial.connect()
    await trial.until(lambda: all(client.protocol.opened for client in trial.clients))
    incarnations = {client.protocol.seen for client in trial.clients}
    await trial.crash()
    for client in trial.clients:
        client.mute.clear()
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert_mean(trial, trial.clients)
    assert all(client.trained == [(1, 0)] for client in trial.clients)
    assert incarnations <= set(trial.clients[0].sent)
    assert [record.updates for record in trial.store.records()] == [4]
    assert trial.store.records()[0].pools == {"pool": 4}


@pytest.mark.parametrize("damage", ["accumulator", "journal"])
async def test_a_sum_that_was_lost_is_trained_again(trials: Any, damage: str) -> None:
    trial = trials(secure={"phaseDeadlineSeconds": 3600})
    for client in trial.clients[2:]:
        client.mute.add("consent")
    trial.start()
    trial.connect()
    await trial.until(lambda: all(client.protocol.opened for client in trial.clients))
    await trial.crash()
    files = trial.directory / "secure"
    if damage == "accumulator":
        (files / "accumulator").write_bytes(bytes((files / "accumulator").stat().st_size))
    else:
        journal = JournalFile(files / "journal")
        entry = journal.read()
        assert entry is not None
        journal.write(entry.__class__(**{**entry.__dict__, "protocol": b"\xff\xff"}), sync=False)
    for client in trial.clients:
        client.mute.clear()
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert_mean(trial, trial.clients)
    assert all(client.trained == [(1, 0), (1, 1)] for client in trial.clients)


async def test_a_sum_that_cannot_be_opened_is_trained_again(trials: Any) -> None:
    """The status says so. The clients' first updates are in no other sum."""
    trial = trials(secure={"phaseDeadlineSeconds": 1})
    for client in trial.clients[2:]:
        client.mute.add("consent")
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.secure.failed == 1)
    assert trial.status.secure.round == 1
    for client in trial.clients:
        client.mute.clear()
    await trial.until(lambda: "round 1 is done again: " in trial.status.message or trial.status.completed_rounds)
    await trial.complete()
    assert_mean(trial, trial.clients)
    assert all(client.trained == [(1, 0), (1, 1)] for client in trial.clients)
    assert (trial.status.secure.failed, trial.status.secure.message) == (1, "")


async def test_a_sum_that_is_lost_twice_ends_the_job(trials: Any) -> None:
    """Clients refuse a third one, so waiting would be for ever. A restarted aggregator says the same."""
    trial = trials(secure={"phaseDeadlineSeconds": 1})
    for client in trial.clients[2:]:
        client.mute.add("consent")
    trial.start()
    trial.connect()
    with pytest.raises(StrategyError) as first:
        await trial.complete()
    for part in ("round 1 cannot be done again", "lost twice", "too few clients agree", "from the model of round 0"):
        assert part in str(first.value)
    assert "\n" not in str(first.value)
    assert all(client.trained == [(1, 0), (1, 1)] for client in trial.clients)
    await trial.crash()
    trial.start()
    trial.connect()
    with pytest.raises(StrategyError) as second:
        await trial.complete()
    assert str(second.value) == str(first.value)
    assert not any(client.refusals for client in trial.clients)


@pytest.mark.usefixtures("impatient")
async def test_too_few_possible_contributors_begin_another_instance(trials: Any) -> None:
    """Two of five are lost before they hand in; the others mask the same updates again, and it is enough."""
    trial = trials(5, secure={"phaseDeadlineSeconds": 3600}, selection={"minClients": 4},
                   stragglers={"minUpdates": 3})  # fmt: skip
    lost = trial.clients[3:]
    for client in lost:
        client.mute.add("push")
    trial.connect()
    trial.start()
    await trial.until(lambda: trial.status.submitted == 3 and all(client.protocol.masks for client in lost))
    for client in lost:
        client.disconnect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert_mean(trial, trial.clients[:3])
    for client in trial.clients[:3]:
        assert client.trained == [(1, 0)]
        assert all(len(updates) == 1 for updates in client.sent.values())
        first, second = list(client.sent.values())[:2]
        assert not torch.equal(first[0]["w"], second[0]["w"])


async def test_at_the_deadline_those_that_have_handed_in_go_on_alone(trials: Any) -> None:
    trial = trials(5, secure={"phaseDeadlineSeconds": 3600}, selection={"minClients": 4},
                   stragglers={"minUpdates": 3, "roundDeadlineSeconds": 1})  # fmt: skip
    for client in trial.clients[3:]:
        client.mute.add("push")
    trial.connect()
    trial.start()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert_mean(trial, trial.clients[:3])
    assert trial.status.secure.survivors == 3


async def test_a_hostile_client_is_left_out_of_the_round(trials: Any) -> None:
    trial = trials(5, stragglers={"minUpdates": 4})

    def spoil(message: Any) -> None:
        if message.HasField("advertise"):
            message.advertise.entry.signature = bytes(64)

    trial.clients[4].spoil = spoil
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.completed_rounds == 1)
    assert_mean(trial, trial.clients[:4])
    counters = trial.metrics.registry.collect()
    faults = [sample for family in counters for sample in family.samples if "secure_faults_total" in sample.name]
    assert [(sample.labels["reason"], sample.value) for sample in faults] == [("signature", 1.0)]


async def test_what_travels_in_clear_is_refused(trials: Any, caplog: pytest.LogCaptureFixture) -> None:
    trial = trials(rounds=1)
    trial.clients[0].mute.add("push")
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.status.submitted == 3)
    client = trial.clients[0]
    member = trial.aggregator.members.get(("pool", 0))
    assert member is not None
    trial.aggregator.sessions.receive(member, pb.ClientMessage(evaluation=pb.Evaluation(num_examples=1)))
    assert "its evaluation is refused: it came in clear" in caplog.text
    client.mute.clear()
    await client.contribute()
    await trial.complete()
    text = " ".join(re.findall(r'"examples": (\d+)', (trial.directory / "rounds.jsonl").read_text()))
    assert set(text.split()) == {"10"}


async def test_a_target_is_compared_with_the_mean(trials: Any) -> None:
    trial = trials(rounds=5, objective={"metric": "score", "target": "1.5"})
    trial.start()
    trial.connect()
    await trial.complete()
    assert trial.status.target_round == 1
    assert trial.status.completed_rounds == 1


async def test_the_sum_that_shows_that_the_target_is_met_is_charged(trials: Any) -> None:
    noise = {"clipNorm": "1", "noiseMultiplier": "1", "delta": "1e-3", "noise": "Distributed"}
    target = {"metric": "score", "target": "1.5"}
    trial = trials(rounds=5, objective=target, privacy={"differentialPrivacy": noise})
    trial.start()
    trial.connect()
    await trial.complete()
    assert trial.status.completed_rounds == 1
    assert trial.status.privacy.rounds == 2


async def test_the_job_ends_without_an_evaluation_that_cannot_be_opened(
    trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.aggregator.rounds.secure_evaluation.EVALUATION_DEADLINE", 2.0)
    trial = trials(3, secure={"phaseDeadlineSeconds": 1})
    trial.start()
    trial.connect()
    await trial.until(lambda: trial.aggregator.training.round is not None)
    for client in trial.clients:
        client.spoil = _silence_evaluation(client, "advertise")
    await trial.complete()
    assert trial.status.completed_rounds == 1
    assert any("the final model, of round 1, was not evaluated" in line for line in trial.status.warnings)


@pytest.mark.parametrize("crash", [False, True])
async def test_the_final_evaluation_is_asked_for_once(trials: Any, crash: bool) -> None:
    """Its sum is lost after clients have agreed to open it: the job ends without it, and says so, also later."""
    trial = trials(secure={"phaseDeadlineSeconds": 3600 if crash else 1})
    for client in trial.clients[2:]:
        client.spoil = _silence_evaluation(client, "consent")
    trial.start()
    trial.connect()
    if crash:
        await trial.until(lambda: all(_agreed_to_evaluate(client) for client in trial.clients))
        await trial.crash()
        file = trial.directory / "secure" / "accumulator"
        file.write_bytes(b"\xff" * file.stat().st_size)
        for client in trial.clients:
            client.spoil = lambda message: None
            client.mute.clear()
        trial.start()
        trial.connect()
    await trial.complete()
    assert trial.status.completed_rounds == 1
    (warning,) = (line for line in trial.status.warnings if "was not evaluated" in line)
    assert "the final model, of round 1, was not evaluated: its sum was lost after the clients had agreed" in warning
    asked = [len(client.sent) for client in trial.clients]
    await trial.crash()
    trial.start()
    trial.connect()
    await trial.complete()
    assert warning in trial.status.warnings
    assert [len(client.sent) for client in trial.clients] == asked == [2] * 4
    assert not any(client.refusals for client in trial.clients)


def _agreed_to_evaluate(client: InProcess) -> bool:
    begin = client.protocol.begin
    return begin is not None and begin.purpose == sa.SecureBegin.EVALUATE and client.protocol.opened


def _silence_evaluation(client: InProcess, step: str) -> Any:
    def spoil(message: Any) -> None:
        if client.protocol.begin is not None and client.protocol.begin.purpose == sa.SecureBegin.EVALUATE:
            client.mute.add(step)

    return spoil
