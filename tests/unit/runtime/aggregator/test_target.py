"""Delivered models, and the clients whose measurements count. Rounds in this process; clients are method calls."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus.aggregator.app import Aggregator
from isthmus.aggregator.clients.membership import Client
from isthmus.aggregator.job import Job
from isthmus.aggregator.storage.checkpoints import CheckpointStore
from isthmus.aggregator.telemetry.metrics import AggregatorMetrics
from isthmus.aggregator.telemetry.tracking.tracker import make_tracker
from isthmus.strategies import make_strategy
from isthmus.tensors import State, specs_of
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import federation_pb2 as pb

SECONDS = 60
POOL, JUDGE = "pool", "judge"


class Trial:
    """A job whose clients submit the number of the round as weights, so that a model shows its round."""

    def __init__(self, directory: Path, clients: int = 3, judges: int = 0, evaluates: bool = True, **spec: Any) -> None:
        pools: list[dict[str, Any]] = [{"name": POOL, "replicas": clients, "cloud": {}}]
        if judges:
            pools.append({"name": JUDGE, "replicas": judges, "role": "Evaluate", "cloud": {}})
        task = {"image": "unused", "command": ["python"]}
        full = {"rounds": 9, "task": task, "pools": pools, "selection": {"minClients": clients}} | spec
        self.spec = parse_spec(full)
        self.directory = directory
        self.trainers = [(POOL, index) for index in range(clients)]
        self.judges = [(JUDGE, index) for index in range(judges)]
        self.evaluates = evaluates
        self.clients: dict[tuple[str, int], Client] = {}

    async def start(self, *, early: bool = False) -> None:
        """Start an aggregator, or restart it after a kill. ``early``: a client reports its measurement at once."""
        job = Job("job", "default", "uid", self.spec)
        store = CheckpointStore(self.directory, "uid", self.spec.checkpoints_kept)
        strategy = make_strategy(self.spec.strategy, self.directory, self.spec.most_trainers)
        tracker = make_tracker(job, self.directory)
        self.aggregator = Aggregator(job, store, strategy, AggregatorMetrics("default", "job"), tracker)
        self.running = asyncio.create_task(self.aggregator.coordinator.run())
        for pool, index in (*self.trainers, *self.judges):
            hello = pb.Hello(
                job_uid="uid", pool=pool, index=index, instance=f"{index}", evaluates=self.evaluates or pool == JUDGE
            )
            self.clients[pool, index] = self.aggregator.sessions.join(hello)
            if early and index == 0:
                await self.until(lambda: self.training.model)
                self.say((pool, index), 0.9)
                assert not self.training.round
        await self.until(lambda: self.training.initialization.asked((POOL, 0)) or self.training.model)
        if self.training.model is None:
            await self.push((POOL, 0), 0)

    async def kill(self) -> None:
        """End the aggregator, as a kill at this point would."""
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    @property
    def training(self) -> Any:
        return self.aggregator.training

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(SECONDS):
            while not what():
                if self.running.done():
                    self.running.result()
                await asyncio.sleep(0.005)

    async def begun(self, number: int) -> None:
        await self.until(lambda: self.training.round is not None and self.training.round.number == number)

    async def push(self, client: tuple[str, int], number: int, loss: float = 1.0) -> None:
        state: State = {"w": torch.full((4,), float(number))}
        header = pb.UpdateHeader(
            job_uid="uid", pool=client[0], index=client[1], instance=str(client[1]), round=number, num_examples=5,
            tensors=specs_of(state),
            base_digest=self.training.model.digest if number else "", metrics={"loss": loss},
        )  # fmt: skip
        reply = await self.aggregator.intake.accept(header, state)
        assert reply.verdict in (pb.PushReply.ACCEPTED, pb.PushReply.STALE, pb.PushReply.CLOSED), reply

    def say(self, client: tuple[str, int], value: float | None, weight: float = 1.0, **changes: Any) -> None:
        """Report a client's measurement of the newest model."""
        model = self.training.model
        fields = {"model_round": model.round, "model_digest": model.digest, "num_examples": weight,
                  "metrics": {} if value is None else {"accuracy": value}} | changes  # fmt: skip
        message = pb.ClientMessage(evaluation=pb.Evaluation(**fields))
        self.aggregator.sessions.receive(self.clients[client], message)

    async def train(self, number: int, *values: float | None, loss: float = 1.0) -> None:
        """Run a round. Before its updates, the first clients measure its base model."""
        await self.begun(number)
        for client, value in zip(self.trainers, values, strict=False):
            self.say(client, value)
        await asyncio.sleep(0)
        if self.aggregator.progress.reached is None:
            await asyncio.gather(*(self.push(client, number, loss) for client in self.trainers))

    async def measure_final(self, *values: float | None) -> None:
        await self.until(lambda: self.training.phase == pb.FederationStatus.EVALUATING)
        for client, value in zip(self.trainers, values, strict=False):
            self.say(client, value)

    async def finish(self) -> pb.FederationStatus:
        async with asyncio.timeout(SECONDS):
            await self.running
        status = self.aggregator.reporter.status()
        assert status.phase == pb.FederationStatus.COMPLETE
        return status

    def weights(self, name: str) -> float:
        """Return the round of a delivered model, which both of its files contain."""
        plain = torch.load(self.directory / f"{name}.pt", weights_only=True)["w"]
        assert torch.equal(plain, load_file(self.directory / f"{name}.safetensors")["w"])
        return float(plain[0])

    def kept(self) -> list[int]:
        return [int(path.stem[6:12]) for path in sorted((self.directory / "checkpoints").glob("round-*.safetensors"))]


def target(value: str = "0.85", **objective: str) -> dict[str, Any]:
    return {"objective": {"target": value} | objective}


KEEP_ONE = {"aggregator": {"checkpoint": {"keep": 1}}}


async def test_the_model_that_met_the_target_is_delivered(tmp_path: Path) -> None:
    trial = Trial(tmp_path, **target())
    await trial.start()
    await trial.train(1)
    await trial.train(2, 0.5, 0.5, 0.5)
    await trial.train(3, 0.9, 0.8, 0.84)  # a mean of 0.8467
    await trial.train(4, 0.9, 0.85, 0.84)  # measured of round 3's model
    status = await trial.finish()
    assert (status.target_round, status.completed_rounds) == (3, 3)
    assert (status.model.path, status.model.round) == ("model.safetensors", 3)
    assert (status.best_model.path, status.best_model.round) == ("model-best.safetensors", 3)
    assert status.best.round == 3
    assert trial.weights("model") == trial.weights("model-best") == 3
    assert trial.kept()[-1] == 3  # round 4 was not committed
    records = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert records[-1]["round"] == 3
    assert records[-1]["metrics"]["accuracy"] == pytest.approx(2.59 / 3)
    assert records[-1]["confirmed"] == {"accuracy": 0.85}


async def test_the_target_is_known_at_the_latest_when_the_round_would_end(tmp_path: Path) -> None:
    """One client never reports: the others are the majority."""
    trial = Trial(tmp_path, **target())
    await trial.start()
    await trial.train(1)
    await trial.begun(2)
    trial.say((POOL, 0), 0.9)
    trial.say((POOL, 1), 0.9)
    await asyncio.sleep(0.05)
    assert trial.training.round.number == 2  # the third client may still report
    await asyncio.gather(*(trial.push(client, 2) for client in trial.trainers))
    status = await trial.finish()
    assert (status.model.round, status.completed_rounds, trial.weights("model")) == (1, 1, 1)


async def test_the_last_round_may_meet_the_target(tmp_path: Path) -> None:
    trial = Trial(tmp_path, rounds=2, **target())
    await trial.start()
    await trial.train(1)
    await trial.train(2, 0.1, 0.1, 0.1)
    await trial.measure_final(0.9, 0.9, 0.9)
    status = await trial.finish()
    assert (status.target_round, status.model.round, trial.weights("model")) == (2, 2, 2)


async def test_without_a_target_the_last_model_is_delivered_and_the_best_beside_it(tmp_path: Path) -> None:
    trial = Trial(tmp_path, rounds=5, **KEEP_ONE)
    await trial.start()
    await trial.train(1)
    for number, value in ((2, 0.2), (3, 0.9), (4, 0.5), (5, 0.4)):
        await trial.train(number, value, value, value)
    await trial.measure_final(0.6, 0.6, 0.6)
    status = await trial.finish()
    assert (status.model.round, status.best_model.round, status.best.round) == (5, 2, 2)
    assert (trial.weights("model"), trial.weights("model-best")) == (5, 2)
    assert trial.kept() == [2, 5]
    assert status.target_round == 0


async def test_without_a_metric_nothing_is_best(tmp_path: Path) -> None:
    (tmp_path / "model-best.pt").touch()  # left by an earlier run
    trial = Trial(tmp_path, rounds=3, evaluates=False, **KEEP_ONE)
    await trial.start()
    for number in (1, 2, 3):
        await trial.train(number)
    status = await trial.finish()
    assert (status.model.round, status.best.name, status.HasField("best_model")) == (3, "", False)
    assert not (tmp_path / "model-best.pt").exists()
    assert trial.kept() == [3]
    assert not status.warnings


@pytest.mark.parametrize("killed_in", [3, 4, 5])
async def test_the_best_survives_kills(tmp_path: Path, killed_in: int) -> None:
    trial = Trial(tmp_path, rounds=5, **KEEP_ONE)
    await trial.start()
    await trial.train(1)
    values = {2: 0.9, 3: 0.5, 4: 0.4, 5: 0.3}
    for number, value in values.items():
        if number == killed_in:
            await trial.begun(number)
            await trial.kill()
            await trial.start()
        await trial.train(number, value, value, value)
    await trial.measure_final(0.1, 0.1, 0.1)
    status = await trial.finish()
    assert (status.model.round, status.best_model.round, trial.weights("model-best")) == (5, 1, 1)
    assert trial.kept() == [1, 5]


async def test_the_best_survives_the_loss_of_the_records(tmp_path: Path) -> None:
    """After a power failure the last records, which are not synced, may be missing."""
    trial = Trial(tmp_path, rounds=4, **KEEP_ONE)
    await trial.start()
    await trial.train(1)
    await trial.train(2, 0.9, 0.9, 0.9)
    await trial.train(3, 0.5, 0.5, 0.5)
    await trial.begun(4)
    await trial.kill()
    (tmp_path / "rounds.jsonl").write_text("")
    await trial.start()
    await trial.train(4, 0.4, 0.4, 0.4)
    await trial.measure_final(0.1, 0.1, 0.1)
    assert (await trial.finish()).best_model.round == 1
    assert (trial.weights("model"), trial.weights("model-best"), trial.kept()) == (4, 1, [1, 4])


async def test_killed_once_the_target_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path, **target(), **KEEP_ONE)
    await trial.start()
    await trial.train(1)
    asleep = asyncio.Event()

    async def die(newest: object) -> None:
        asleep.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("isthmus.aggregator.rounds.delivery.Delivery.deliver", lambda self, newest: die(newest))
    await trial.train(2, 0.9, 0.9, 0.9)
    async with asyncio.timeout(SECONDS):
        await asleep.wait()
    await trial.kill()
    monkeypatch.undo()
    await trial.start()
    status = await trial.finish()  # no model is measured again, but all clients receive a stop
    for client in trial.clients.values():
        assert client.outbox is not None
        messages = [client.outbox.get_nowait() for _ in range(client.outbox.qsize())]
        assert messages[-1] is not None and messages[-1].stop.reason == pb.Stop.COMPLETE
        assert not any(message.HasField("offer") for message in messages if message is not None)
    assert (status.target_round, status.model.round, trial.weights("model"), trial.kept()) == (1, 1, 1, [1])


async def test_a_higher_target_continues_and_a_lower_one_finds_the_model_that_met_it(tmp_path: Path) -> None:
    trial = Trial(tmp_path, **target())
    await trial.start()
    await trial.train(1)
    await trial.train(2, 0.9, 0.9, 0.9)
    assert (await trial.finish()).model.round == 1
    trial.spec = trial.spec.model_copy(update={"rounds": 3, "objective": parse_objective("0.95")})
    await trial.start()
    await trial.train(2, 0.9, 0.9, 0.9)
    await trial.train(3, 0.8, 0.8, 0.8)
    await trial.measure_final(0.7, 0.7, 0.7)
    status = await trial.finish()
    assert (status.target_round, status.model.round, status.best_model.round) == (0, 3, 1)
    trial.spec = trial.spec.model_copy(update={"rounds": 9, "objective": parse_objective("0.75")})
    await trial.start()
    status = await trial.finish()
    assert (status.target_round, status.model.round, trial.weights("model")) == (2, 2, 2)


def parse_objective(value: str) -> Any:
    pool = {"name": POOL, "cloud": {}}
    task = {"image": "unused", "command": ["python"]}
    return parse_spec({"rounds": 1, "task": task, "pools": [pool], **target(value)}).objective


@pytest.mark.parametrize("weight", [2.0**53, 2.0**64 - 1, math.inf, math.nan, -1.0, 1.0])
@pytest.mark.parametrize("value", [1.0, 1e300])
async def test_one_client_alone_cannot_end_a_job(tmp_path: Path, weight: float, value: float) -> None:
    trial = Trial(tmp_path, rounds=3, **target())
    await trial.start()
    await trial.train(1)
    for number in (2, 3):
        await trial.begun(number)
        trial.say((POOL, 2), value, weight)
        trial.say((POOL, 2), value, 1.0)  # repeated
        await trial.train(number, 0.1, 0.1)
    await trial.measure_final(0.1, 0.1)
    trial.say((POOL, 2), value, weight)
    status = await trial.finish()
    assert (status.completed_rounds, status.target_round, status.model.round) == (3, 0, 3)
    told = [warning for warning in status.warnings if "more than half" in warning]
    newest = {metric.name: metric.value for metric in status.metrics}
    assert bool(told) == (newest.get("accuracy", 0.0) >= 0.85)


async def test_two_of_four_clients_cannot_end_a_job_and_three_can(tmp_path: Path) -> None:
    trial = Trial(tmp_path, clients=4, rounds=3, **target())
    await trial.start()
    await trial.train(1)
    await trial.train(2, 1.0, 1.0, 0.8, 0.8)
    assert trial.aggregator.progress.reached is None
    await trial.train(3, 1.0, 1.0, 1.0, 0.8)
    assert (await trial.finish()).model.round == 2


async def test_measurements_of_clients_that_were_not_asked_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trial = Trial(tmp_path, judges=1, evaluates=False, rounds=3, **target())
    await trial.start()
    await trial.train(1)
    await trial.begun(2)
    for _ in range(3):
        trial.say((POOL, 0), 1.0, 2.0**53)  # it trains, and has no evaluation function by its hello
    trial.say((JUDGE, 0), 0.3)
    trial.say((JUDGE, 0), 1.0)  # the first report counts
    await trial.train(2)
    await trial.begun(3)
    trial.say((JUDGE, 0), 0.95, model_digest="of another model")
    assert [metric.name for metric in trial.aggregator.reporter.status().metrics] == ["accuracy", "train_loss"]
    trial.say((JUDGE, 0), 0.9)
    status = await trial.finish()
    assert (status.target_round, status.model.round) == (2, 2)
    refusals = [record.message for record in caplog.records if "left out" in record.message]
    assert refusals == ["pool/0: its evaluation of round 1 is left out: this client was not asked for it"]


async def test_untrained_weights_meet_no_target(tmp_path: Path) -> None:
    trial = Trial(tmp_path, rounds=2, **target())
    await trial.start()
    await trial.train(1, 1.0, 1.0, 1.0)
    await trial.train(2)
    await trial.measure_final(0.1, 0.1, 0.1)
    assert (await trial.finish()).model.round == 2


async def test_with_a_robust_strategy_a_minority_does_not_choose_the_best(tmp_path: Path) -> None:
    trial = Trial(tmp_path, rounds=3, strategy={"algorithm": "CoordinateMedian"})
    await trial.start()
    await trial.train(1)
    for number, honest, lie in ((2, 0.2, 1e300), (3, 0.6, -1e300)):
        await trial.begun(number)
        trial.say((POOL, 2), lie, 2.0**53)
        await trial.train(number, honest, honest)
    await trial.measure_final(0.5, 0.5)
    trial.say((POOL, 2), 1.0)
    status = await trial.finish()
    assert (status.best_model.round, status.best.value) == (2, 0.6)


async def test_a_training_metric_as_objective(tmp_path: Path) -> None:
    objective = {"objective": {"metric": "train_loss", "goal": "Minimize", "target": "0.1"}}
    trial = Trial(tmp_path, evaluates=False, **objective)
    await trial.start()
    await trial.train(1, loss=0.5)
    await trial.begun(2)
    await trial.push((POOL, 0), 2, -1e9)  # a false report
    await trial.push((POOL, 1), 2, 0.3)
    await trial.push((POOL, 2), 2, 0.3)
    await trial.train(3, loss=0.05)
    status = await trial.finish()
    assert (status.target_round, status.model.round, trial.weights("model")) == (3, 3, 3)


async def test_clients_without_examples_do_not_count(tmp_path: Path) -> None:
    trial = Trial(tmp_path, **target())
    await trial.start()
    await trial.train(1)
    await trial.begun(2)
    trial.say((POOL, 1), math.nan, 0)
    trial.say((POOL, 2), 0.0, 0)
    await trial.train(2, 0.9)
    status = await trial.finish()
    assert (status.model.round, status.best.value) == (1, 0.9)


async def test_an_objective_that_is_not_reported_gives_a_warning_after_the_first_round(tmp_path: Path) -> None:
    trial = Trial(tmp_path, objective={"metric": "acuracy"})
    await trial.start()
    await trial.train(1)
    await trial.begun(2)
    for client in trial.trainers:
        trial.say(client, 0.5)
    (warning,) = trial.aggregator.reporter.status().warnings
    expected = "objective.metric: no client reports 'acuracy'; reported: accuracy, train_loss; did you mean accuracy?"
    assert warning == trial.aggregator.reporter.status().message == expected
    await trial.kill()


async def test_an_unreadable_best_model_does_not_fail_the_job(tmp_path: Path) -> None:
    trial = Trial(tmp_path, rounds=4, **KEEP_ONE)
    await trial.start()
    await trial.train(1)
    await trial.train(2, 0.9, 0.9, 0.9)
    await trial.train(3, 0.5, 0.5, 0.5)
    await trial.begun(4)
    (tmp_path / "checkpoints" / "round-000001.safetensors").write_bytes(b"torn")
    await trial.train(4, 0.4, 0.4, 0.4)
    await trial.measure_final(0.1, 0.1, 0.1)
    status = await trial.finish()
    assert (status.model.round, trial.weights("model")) == (4, 4)
    assert "the best model, of round 1, is in checkpoints/ only" in status.warnings[0]


async def test_after_a_restart_updates_may_arrive_before_measurements(tmp_path: Path) -> None:
    """A client sends a finished update at once, and its measurement when the round is offered again."""
    trial = Trial(tmp_path, **target())
    await trial.start()
    await trial.train(1)
    await trial.begun(2)
    await trial.kill()
    # A measurement made for the killed aggregator may reach the next one before that has asked for it.
    await trial.start(early=True)
    await trial.begun(2)
    await asyncio.gather(*(trial.push(client, 2) for client in trial.trainers))
    await asyncio.sleep(0.1)
    assert trial.training.model.round == 1
    for client in trial.trainers:
        trial.say(client, 0.9)
    status = await trial.finish()
    assert (status.completed_rounds, status.model.round) == (1, 1)
