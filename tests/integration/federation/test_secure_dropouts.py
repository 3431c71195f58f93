"""Clients that are killed in the phases of secure aggregation: rounds end, with the mean over the survivors."""

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Federation
from .linear_model import build, data, train
from .secure_parties import Parties
from .test_faults import records, trained, updates

Make = Callable[..., Federation]
CLIENTS, VICTIMS = 16, 5
RATE = "0.01"
TASK = {"image": "unused", "command": ["python"], "config": {"rate": RATE}}
PHASES = ("advertise", "shares", "push", "consent", "unmask")
# Fixed bounds, so that every round has the same precision.
SECURE = {"secureAggregation": {"metrics": {"score": "100"}, "clip": "16", "maxExamples": 200,
                                "phaseDeadlineSeconds": 10}}  # fmt: skip
# The bounds' steps are below 1e-5; statistics of batch normalisation have larger ones.
TOLERANCE = 1e-3


@pytest.fixture
def dying(script: Path) -> Path:
    """Return the path of the script that dies, beside the one that trains."""
    path = script.with_name("dying.py")
    path.write_text((Path(__file__).parent / "dying_client.py").read_text())
    return path


def checkpoint(job: Federation, number: int) -> dict[str, torch.Tensor]:
    return load_file(job.state / "checkpoints" / f"round-{number:06d}.safetensors")


def reference(job: Federation, number: int, survivors: Collection[int]) -> dict[str, torch.Tensor]:
    """Return the weighted mean over the survivors, trained here from the round's base model."""
    sums: dict[str, torch.Tensor] = {}
    total = sum(len(data(client)[0]) for client in survivors)
    for client in survivors:
        model = build()
        model.load_state_dict(checkpoint(job, number - 1))
        train(model, client, torch.optim.SGD(model.parameters(), lr=float(RATE)))
        for name, tensor in model.state_dict().items():
            share = tensor.double() * len(data(client)[0]) / total
            sums[name] = sums[name] + share if name in sums else share
    return sums


def assert_mean(job: Federation, number: int, survivors: Collection[int]) -> None:
    found = checkpoint(job, number)
    for name, expected in reference(job, number, survivors).items():
        torch.testing.assert_close(
            found[name].double(), expected, rtol=0, atol=TOLERANCE, msg=f"round {number}: {name}"
        )


def test_one_round_equals_fedavg(federation: Make, script: Path) -> None:
    parties = Parties()
    job = federation(4, 3, privacy=SECURE, task=TASK, aggregator={"checkpoint": {"keep": 100}})
    job.start_aggregator()
    clients = [parties.start_client(job, script, index) for index in range(4)]
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 4, job.log("client-0-0")
    assert status.completed_rounds == 3
    assert [record["updates"] for record in records(job)] == [4] * 3
    assert all(trained(job, index).total() == 3 for index in range(4))
    for number in (1, 2, 3):
        assert_mean(job, number, range(4))
    assert [record["examples"] for record in records(job)] == [sum(len(data(k)[0]) for k in range(4))] * 3


def victims_of(number: int) -> list[int]:
    """Return the clients that die in a round."""
    return [(index + VICTIMS * (number - 1)) % CLIENTS for index in range(VICTIMS)]


def next_death(client: int, after: int = 0) -> str:
    """Return step and round at which a client dies next, as dying_client.py takes them."""
    deaths = (f"{phase}:{n}" for n, phase in enumerate(PHASES, start=1) if n > after and client in victims_of(n))
    return next(deaths, ":0")


@pytest.mark.timeout(900)
def test_a_third_of_the_clients_die_in_each_phase(federation: Make, dying: Path) -> None:
    """In each round five of sixteen die at a step, and are replaced for the next round."""
    rounds, parties = len(PHASES) + 1, Parties()
    job = federation(
        CLIENTS, rounds, privacy=SECURE, task=TASK, aggregator={"checkpoint": {"keep": 100}},
        stragglers={"minUpdates": CLIENTS - VICTIMS},
    )  # fmt: skip
    job.start_aggregator()
    attempts = [0] * CLIENTS
    hold = {"HOLD": str(rounds)}  # the last round, so that the aggregator is there until all is checked
    processes = {
        index: parties.start_client(job, dying, index, DIE=next_death(index), **hold) for index in range(CLIENTS)
    }
    for number, phase in enumerate(PHASES, start=1):
        victims = victims_of(number)
        for index in victims:
            assert processes[index].wait() == -9, f"{phase}: {job.log(f'client-{index}-{attempts[index]}')}"
        for index in victims:
            attempts[index] += 1
            fate = next_death(index, after=number)
            processes[index] = parties.start_client(job, dying, index, attempts[index], DIE=fate, **hold)
        job.wait_for_round(number)
        gone = victims if phase in ("advertise", "shares", "push") else []
        assert_mean(job, number, set(range(CLIENTS)) - set(gone))
        assert updates(job)[number] == CLIENTS - len(gone), phase
    job.let_go()
    job.wait_for_completion()
    assert [process.wait() for process in processes.values()] == [0] * CLIENTS, job.log("aggregator")
    assert job.log("aggregator").count("is done again") == 0
