"""SCAFFOLD, FedDyn and FedNova, round by round, against the papers' algorithms in plain PyTorch."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import linear_model
from .conftest import Federation

CLIENTS, ROUNDS, RATE, ALPHA = 2, 4, 0.05, 0.2
STEPS = (3, 5)
State = dict[str, torch.Tensor]


def train(model: torch.nn.Module, client: int, correct: Callable[[str, torch.Tensor], torch.Tensor]) -> State:
    """Run local SGD with corrected gradients; return the trained state."""
    local = deepcopy(model)
    inputs, targets = linear_model.data(client)
    local.train()
    for _ in range(STEPS[client]):
        local.zero_grad()
        (local(inputs).squeeze(1) - targets).square().mean().backward()
        with torch.no_grad():
            for name, weight in local.named_parameters():
                weight.sub_(RATE * (weight.grad + correct(name, weight)))
    return deepcopy(local.state_dict())


def reference(algorithm: str) -> list[State]:
    """Return the global model after each round, computed in plain PyTorch."""
    model = linear_model.build()
    names = [name for name, _ in model.named_parameters()]
    zeros = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    server, own = deepcopy(zeros), [deepcopy(zeros) for _ in range(CLIENTS)]
    sizes = [len(linear_model.data(client)[0]) for client in range(CLIENTS)]
    shares = [size / sum(sizes) for size in sizes]
    results = []
    for _ in range(ROUNDS):
        start = deepcopy(model.state_dict())

        def correct(name: str, weight: torch.Tensor, client: int, start: State = start) -> torch.Tensor:
            if algorithm == "SCAFFOLD":
                return server[name] - own[client][name]
            if algorithm == "FedDyn":
                return -own[client][name] + ALPHA * (weight - start[name])
            return torch.zeros_like(weight)

        states = [
            train(model, client, lambda name, weight, client=client: correct(name, weight, client))  # type: ignore[misc]
            for client in range(CLIENTS)
        ]
        result = {
            name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
            for name in start
        }
        for name in names:
            moves = [state[name] - start[name] for state in states]
            if algorithm == "SCAFFOLD":
                new = [own[k][name] - server[name] - moves[k] / (STEPS[k] * RATE) for k in range(CLIENTS)]
                server[name] = server[name] + sum(shares[k] * (new[k] - own[k][name]) for k in range(CLIENTS))
                for k in range(CLIENTS):
                    own[k][name] = new[k]
            elif algorithm == "FedDyn":
                server[name] = server[name] - ALPHA * sum(shares[k] * moves[k] for k in range(CLIENTS))
                result[name] = result[name] - server[name] / ALPHA
                for k in range(CLIENTS):
                    own[k][name] = own[k][name] - ALPHA * moves[k]
            else:
                effective = sum(shares[k] * STEPS[k] for k in range(CLIENTS))
                normalised = sum(shares[k] * moves[k] / STEPS[k] for k in range(CLIENTS))
                result[name] = start[name] + effective * normalised
        model.load_state_dict(
            {name: torch.as_tensor(value).round() if "num_batches" in name else value for name, value in result.items()}
        )
        results.append(deepcopy(model.state_dict()))
    return results


@pytest.mark.parametrize(
    ("algorithm", "parameters", "kill"),
    [("SCAFFOLD", {}, True), ("FedDyn", {"alpha": str(ALPHA)}, False), ("FedNova", {}, False)],
    ids=["SCAFFOLD", "FedDyn", "FedNova"],
)
def test_round_by_round(
    federation: Callable[..., Federation], script: Path, algorithm: str, parameters: dict[str, str], kill: bool
) -> None:
    job = federation(
        CLIENTS, ROUNDS,
        strategy={"algorithm": algorithm, "parameters": parameters},
        aggregator={"checkpoint": {"keep": 100}},
        task={"image": "unused", "command": ["python"], "config": {"rate": str(RATE)}},
    )  # fmt: skip
    job.start_aggregator()
    slow = {"PAUSE": "0.3", "HOLD": "4"} if kill else {}
    clients = [job.start_client(script, k, STEPS=str(STEPS[k]), **slow) for k in range(CLIENTS)]
    if kill:  # the server's part of the correction is restored from the checkpoint
        job.wait_for_round(2)
        job.kill_aggregator()
        job.start_aggregator()
        job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    for number, expected in enumerate(reference(algorithm), start=1):
        actual = load_file(job.state / "checkpoints" / f"round-{number:06d}.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-4, msg=f"round {number}, {name}")


def test_qfedavg_asks_for_the_loss(federation: Callable[..., Federation], script: Path) -> None:
    job = federation(1, 2, strategy={"algorithm": "QFedAvg"})
    job.start_aggregator()
    client = job.start_client(script)
    assert client.wait() == 1
    assert "QFedAvg needs the loss at the global model" in job.log("client-0-0")
