"""Rounds of a job in this process, with a scripted strategy. Clients are method calls."""

import asyncio
import errno
import math
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.aggregator.app import Aggregator
from isthmus.aggregator.job import Job
from isthmus.aggregator.storage.checkpoints import CheckpointStore
from isthmus.aggregator.telemetry.metrics import AggregatorMetrics
from isthmus.aggregator.telemetry.tracking.tracker import make_tracker
from isthmus.aggregator.updates.validation import StorageError
from isthmus.strategies import Strategy, StrategyError, Update
from isthmus.tensors import State, specs_of
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import federation_pb2 as pb

# Large enough to be folded in a thread.
VALUES = 400_000
SECONDS = 60


class Scripted(Strategy):
    """Calls ``on_accept``, then stores the update. The result is ``result``: zeros unless a test changes it."""

    def __init__(self) -> None:
        self.on_accept: Callable[[], None] = lambda: None
        self.updates: list[Update] = []
        self.result: State = {"w": torch.zeros(VALUES), "statistics": torch.zeros(1)}

    def begin(self, model: State) -> None:
        self.updates.clear()

    def accept(self, update: Update) -> None:
        self.on_accept()
        self.updates.append(update)

    def finish(self) -> State:
        return self.result


class Trial:
    """An aggregator with two clients."""

    def __init__(self, directory: Path, strategy: Scripted, **changes: Any) -> None:
        pool = {"name": "pool", "replicas": 2, "cloud": {}}
        task = {"image": "unused", "command": ["python"]}
        spec = {"rounds": 1, "task": task, "pools": [pool], "selection": {"policy": "Adaptive", "minClients": 2},
                **changes}  # fmt: skip
        job = Job("job", "default", "uid", parse_spec(spec))
        self.store = CheckpointStore(directory, "uid", keep=2)
        self.strategy = strategy
        self.aggregator = Aggregator(
            job, self.store, strategy, AggregatorMetrics("default", "job"), make_tracker(job, directory)
        )

    def message(self) -> str:
        return self.aggregator.reporter.status().message

    async def until(self, what: Callable[[], Any]) -> None:
        async with asyncio.timeout(SECONDS):
            while not what():  # noqa: ASYNC110 - conditions of many kinds
                await asyncio.sleep(0.01)

    async def begin(self) -> "asyncio.Task[None]":
        """Start training, and return once the first round is in progress."""
        running = asyncio.create_task(self.aggregator.coordinator.run())
        training = self.aggregator.training
        for index in range(2):
            self.aggregator.sessions.join(pb.Hello(job_uid="uid", pool="pool", index=index, instance=str(index)))
        await self.until(lambda: training.initialization.asked(("pool", 0)))
        await self.push(0, number=0, buffers=["statistics"])
        await self.until(lambda: training.round)
        return running

    def push(self, index: int, number: int = 1, value: float = 1.0, **changes: Any) -> Awaitable[pb.PushReply]:
        state = {"w": torch.full((VALUES,), value), "statistics": torch.ones(1)}
        model = self.aggregator.training.model
        header = pb.UpdateHeader(
            job_uid="uid", pool="pool", index=index, round=number, num_examples=5, tensors=specs_of(state),
            instance=str(index),
            base_digest=model.digest if model is not None else "", **changes,
        )  # fmt: skip
        return asyncio.create_task(self.aggregator.intake.accept(header, state))


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path, Scripted())


async def test_the_first_round_waits_for_clients_beyond_the_quorum(trial: Trial) -> None:
    aggregator, training = trial.aggregator, trial.aggregator.training
    aggregator.coordinator.wait_for(3)
    running = asyncio.create_task(aggregator.coordinator.run())
    for index in range(2):
        aggregator.sessions.join(pb.Hello(job_uid="uid", pool="pool", index=index, instance=str(index)))
    await trial.until(lambda: aggregator.reporter.status().message == "2 of 3 clients are connected")
    assert training.phase == pb.FederationStatus.WAITING
    aggregator.coordinator.wait_for(2)  # one client is not expected any more
    await trial.until(lambda: training.phase == pb.FederationStatus.INITIALIZING)
    aggregator.coordinator.wait_for(3)  # too late
    await trial.push(0, number=0, buffers=["statistics"])
    await trial.until(lambda: training.round)
    running.cancel()


async def test_a_repetition_is_answered_once_the_first_is_folded(trial: Trial) -> None:
    """After this reply, the client releases its update."""
    running = await trial.begin()
    full, begun = threading.Event(), threading.Event()

    def once_full() -> None:
        begun.set()
        assert full.wait(SECONDS)
        trial.strategy.on_accept = lambda: None
        raise OSError(errno.ENOSPC, "No space left on device")

    trial.strategy.on_accept = once_full
    first = trial.push(0)
    await trial.until(begun.is_set)
    again = trial.push(0)
    other = trial.push(1)
    await trial.until(lambda: len(trial.aggregator.training.round.accepted) == 2)  # type: ignore[union-attr]
    full.set()
    with pytest.raises(StorageError, match="No space left on device; trying again"):
        await first
    assert [(await push).verdict for push in (again, other)] == [pb.PushReply.ACCEPTED] * 2
    assert sorted(update.client for update in trial.strategy.updates) == ["pool/0", "pool/1"]
    running.cancel()


async def test_a_strategy_that_fails_on_an_update_ends_the_job(trial: Trial) -> None:
    """The sum may contain half of the update."""

    def fail() -> None:
        raise ZeroDivisionError("division by zero")

    running = await trial.begin()
    trial.strategy.on_accept = fail
    reply = await trial.push(0)
    message = "the strategy failed on the update of pool/0: ZeroDivisionError: division by zero"
    assert reply.verdict == pb.PushReply.STALE and reply.message.startswith(message)
    with pytest.raises(StrategyError, match=message):
        await running


async def test_a_client_that_keeps_diverging_ends_the_job_with_a_hint(tmp_path: Path) -> None:
    trial = Trial(tmp_path, Scripted(), stragglers={"roundDeadlineSeconds": 1}, backoffLimit=1)
    running = await trial.begin()
    state = trial.aggregator.training.round
    assert state is not None
    await trial.push(1)
    for value in (math.nan, 2.0**70):
        await trial.until(lambda: not state.rejected)  # it is offered the round, or offered it again
        assert (await trial.push(0, value=value)).verdict == pb.PushReply.INVALID
        await trial.until(lambda: trial.message().endswith("; a lower learning rate may help"))
    message = (
        "round 1 cannot end: pool/0 has submitted NaN, infinity or huge numbers 2 times, and a round needs 2 updates;"
    )
    with pytest.raises(StrategyError, match=message):
        await asyncio.wait_for(running, SECONDS)


async def test_repeated_failures_of_a_client_count_once(trial: Trial, caplog: pytest.LogCaptureFixture) -> None:
    """A client can neither fill the log nor displace other clients' failures in the status."""
    running = await trial.begin()
    client = trial.aggregator.members.get(("pool", 1))
    assert client is not None
    for number in range(100):
        failure = pb.Failure(message=f"ValueError: {number}\nforged")
        trial.aggregator.sessions.receive(client, pb.ClientMessage(failure=failure))
    assert [failure.message for failure in trial.aggregator.reporter.status().pools[0].failures] == [
        "ValueError: 0 forged"
    ]
    assert sum("failed: ValueError" in record.message for record in caplog.records) == 1
    running.cancel()


async def test_repeated_refusals_count_once_until_the_round_is_offered_again(trial: Trial) -> None:
    """Otherwise a client that repeats its update would exhaust the job's back-off limit in a moment."""
    running = await trial.begin()
    for _ in range(5):
        assert (await trial.push(0, value=math.nan)).verdict == pb.PushReply.INVALID
    state = trial.aggregator.training.round
    assert state is not None and state.diverged == {("pool", 0): 1}
    running.cancel()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
async def test_a_result_that_is_not_finite_is_not_committed(trial: Trial, value: float) -> None:
    running = await trial.begin()
    trial.strategy.result["w"][7] = value
    for index in range(2):
        assert (await trial.push(index)).verdict == pb.PushReply.ACCEPTED
    with pytest.raises(StrategyError, match="the result of round 1 holds NaN or infinity in w: smaller steps may help"):
        await running
    assert trial.store.numbers() == [0]


async def test_the_names_of_buffers_are_the_same_for_all_clients(trial: Trial) -> None:
    """A client cannot exclude a parameter from the strategy. The names are stored for restarts."""
    running = await trial.begin()
    training = trial.aggregator.training
    assert training.model is not None and training.model.checkpoint.notes["buffers"] == '["statistics"]'
    await trial.push(0, buffers=["w"])
    await trial.push(1)
    assert [update.buffers for update in trial.strategy.updates] == [{"statistics"}] * 2
    running.cancel()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
async def test_a_loss_that_is_not_finite_is_ignored(trial: Trial, loss: float) -> None:
    running = await trial.begin()
    await trial.push(0, metrics={"loss": loss})
    await trial.push(1, metrics={"loss": 2.0})
    assert trial.aggregator.training.round is not None
    reports = {client[1]: report.loss for client, report in trial.aggregator.training.round.reports}
    assert reports == {0: None, 1: 2.0}
    running.cancel()


async def test_initial_weights_that_are_refused_leave_a_reason(trial: Trial) -> None:
    running = asyncio.create_task(trial.aggregator.coordinator.run())
    for index in range(2):
        trial.aggregator.sessions.join(pb.Hello(job_uid="uid", pool="pool", index=index, instance=str(index)))
    initialization = trial.aggregator.training.initialization
    await trial.until(lambda: initialization.asked(("pool", 0)))
    mask = {"mask": torch.tensor([0.0, -math.inf])}
    header = pb.UpdateHeader(
        job_uid="uid", pool="pool", index=0, instance="0", num_examples=1, tensors=specs_of(mask)
    )  # fmt: skip
    reply = await trial.aggregator.intake.accept(header, mask)
    assert (reply.verdict, reply.reason) == (pb.PushReply.INVALID, "non_finite")
    message = "the initial weights of pool/0 were refused: mask holds NaN or infinity"
    assert trial.message() == message
    await trial.until(lambda: initialization.asked(("pool", 1)))
    running.cancel()


async def test_a_client_without_held_out_data_does_not_count(trial: Trial) -> None:
    aggregator, training = trial.aggregator, trial.aggregator.training
    running = await trial.begin()
    clients = [
        aggregator.sessions.join(pb.Hello(job_uid="uid", pool="pool", index=index, instance=str(index), evaluates=True))
        for index in range(2)
    ]
    await asyncio.gather(trial.push(0), trial.push(1))
    await trial.until(lambda: training.phase == pb.FederationStatus.EVALUATING)
    assert training.model is not None
    for client, examples, accuracy in ((clients[0], 3, 0.9), (clients[1], 0, 0.0)):
        evaluation = pb.Evaluation(
            model_round=1, model_digest=training.model.digest, num_examples=examples, metrics={"accuracy": accuracy}
        )
        aggregator.sessions.receive(client, pb.ClientMessage(evaluation=evaluation))
    async with asyncio.timeout(SECONDS):
        await running
    assert aggregator.progress.newest["accuracy"].value == pytest.approx(0.9)


async def test_the_status_waits_for_clients_only_while_some_are_missing(trial: Trial) -> None:
    aggregator = trial.aggregator
    running = await trial.begin()
    client = aggregator.members.get(("pool", 1))
    assert client is not None
    aggregator.sessions.receive(client, pb.ClientMessage(failure=pb.Failure(message="ValueError")))
    missing = "round 1 has 0 of 2 needed updates; waiting for clients"
    await trial.until(lambda: aggregator.reporter.status().message == missing)
    await trial.push(0)
    await trial.until(lambda: aggregator.reporter.status().message == missing.replace("0 of 2", "1 of 2"))
    aggregator.sessions.join(pb.Hello(job_uid="uid", pool="pool", index=1, attempt=1, instance="again"))
    await trial.until(lambda: aggregator.reporter.status().message == "")
    running.cancel()


async def test_the_status_forgets_a_full_disk_once_an_update_is_kept(trial: Trial) -> None:
    running = await trial.begin()

    def once_full() -> None:
        trial.strategy.on_accept = lambda: None
        raise OSError(errno.ENOSPC, "No space left on device")

    trial.strategy.on_accept = once_full
    with pytest.raises(StorageError, match="No space left on device; trying again"):
        await trial.push(0)
    message = "an update cannot be kept: No space left on device; trying again"
    assert trial.message() == message
    assert (await trial.push(0)).verdict == pb.PushReply.ACCEPTED
    assert trial.aggregator.training.round is not None
    assert trial.message() == ""
    running.cancel()


async def test_metrics_of_an_update_that_was_not_kept_do_not_count(tmp_path: Path) -> None:
    trial = Trial(tmp_path, Scripted(), selection={"minClients": 1})
    running = await trial.begin()

    def once_full() -> None:
        trial.strategy.on_accept = lambda: None
        raise OSError(errno.ENOSPC, "No space left on device")

    trial.strategy.on_accept = once_full
    with pytest.raises(StorageError):
        await trial.push(0, metrics={"loss": 100.0})
    client = trial.aggregator.members.get(("pool", 0))
    assert client is not None
    trial.aggregator.sessions.receive(client, pb.ClientMessage(failure=pb.Failure(message="ValueError")))
    assert (await trial.push(1, metrics={"loss": 2.0})).verdict == pb.PushReply.ACCEPTED
    async with asyncio.timeout(SECONDS):
        await running
    (record,) = trial.store.records()
    assert (record.updates, record.examples, record.metrics) == (1, 5, {"train_loss": 2.0})
