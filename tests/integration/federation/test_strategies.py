"""Strategies with state, in real processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Federation

FEDADAM = {"algorithm": "FedAdam", "parameters": {"learningRate": "0.05"}}

RULES = """
from isthmus.strategies.averaging.fedavg import FedAvg

class Asks(FedAvg):
    scalars = ("steps",)

class Raises(FedAvg):
    def accept(self, update):
        raise ValueError("not today")

class Reads(FedAvg):
    def finish(self):
        return open("/nowhere/table")

class Counts(FedAvg):
    def state(self):
        return {"rounds": 1}

class Full(FedAvg):
    def finish(self):
        raise OSError(28, "No space left on device")
"""


def train(job: Federation, script: Path, kill_after: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Return the final model of a run whose aggregator is killed after some rounds."""
    job.start_aggregator()
    slow = {"PAUSE": "0.1", "HOLD": "6"} if kill_after else {}
    clients = [job.start_client(script, index, **slow) for index in range(2)]
    for number in kill_after:
        job.wait_for_round(number)
        job.kill_aggregator()
        job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    return load_file(job.state / "model.safetensors")


def test_a_killed_aggregator_keeps_the_optimizers_memory(federation: Callable[..., Federation], script: Path) -> None:
    undisturbed = train(federation(2, 7, strategy=FEDADAM), script)
    killed = train(federation(2, 7, strategy=FEDADAM), script, kill_after=(2, 4))
    # Updates are summed in order of arrival, and Adam's division magnifies the rounding errors.
    for name, tensor in undisturbed.items():
        torch.testing.assert_close(killed[name], tensor, rtol=1e-3, atol=1e-4)
    assert (undisturbed["1.running_var"] > 0).all()


def test_a_liar_does_not_move_the_median(federation: Callable[..., Federation], script: Path) -> None:
    job = federation(3, 3, strategy={"algorithm": "CoordinateMedian"})
    job.start_aggregator()
    clients = [job.start_client(script, index, SCALE="1e6" if index == 1 else "1") for index in range(3)]
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 3, job.log("client-0-0")
    weights = load_file(job.state / "model.safetensors")
    assert all(tensor.abs().max() < 100 for tensor in weights.values())
    assert not list(job.state.glob("updates-*"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("rules:Missing", "spec.strategy.class: rules:Missing: rules has no Missing"),
        (
            "rules:Asks",
            "spec.strategy.class: rules:Asks: its scalars are ('steps',), which clients report for the built-in"
            " algorithms only; leave them empty",
        ),
        ("rules:Raises", "spec.strategy.class: rules:Raises: accept() raised ValueError: not today"),
        (
            "rules:Reads",
            "spec.strategy.class: rules:Reads: finish() raised FileNotFoundError: [Errno 2] No such file or directory:"
            " '/nowhere/table'",
        ),
        ("rules:Counts", "spec.strategy.class: rules:Counts: state() returned no state: rounds is a int, not a tensor"),
    ],
)
def test_a_broken_class_fails_the_job(
    federation: Callable[..., Federation], script: Path, reference: str, message: str
) -> None:
    job = federation(1, 2, strategy={"algorithm": "Custom", "class": reference})
    (job.directory / "rules.py").write_text(RULES)
    last_words = job.directory / "termination-log"
    last_words.touch()
    job.start_aggregator(wait=False, arguments=["--termination-log", last_words])
    assert job.aggregator is not None
    if reference not in ("rules:Missing", "rules:Asks"):
        job.wait_for_port()
        client = job.start_client(script)
        assert client.wait() == 1
        assert message in job.log("client-0-0")
    assert job.aggregator.wait() == 1
    said = json.loads(last_words.read_text())
    assert (said["phase"], said["message"]) == ("FAILED", message)


def test_an_unforeseen_error_leaves_a_line(federation: Callable[..., Federation], script: Path) -> None:
    job = federation(1, 2, strategy={"algorithm": "Custom", "class": "rules:Full"})
    (job.directory / "rules.py").write_text(RULES)
    last_words = job.directory / "termination-log"
    last_words.touch()
    job.start_aggregator(arguments=["--termination-log", last_words])
    job.start_client(script)
    assert job.aggregator is not None
    assert job.aggregator.wait() == 1
    # The log holds no status: the operator would take that for the job's end, and not restart the aggregator.
    expected = "unexpected error: OSError: [Errno 28] No space left on device; see the aggregator's log"
    assert last_words.read_text() == expected
    assert "Traceback" in job.log("aggregator")
