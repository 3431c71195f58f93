"""A federation's models equal those of plain PyTorch with the same seeds and data, averaged offline, in every round."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import linear_model
from .conftest import Federation

CLIENTS, ROUNDS, RATE = 3, 4, 0.1


def reference(mu: float) -> list[dict[str, torch.Tensor]]:
    """Return the global model after each round, computed in plain PyTorch."""
    model = linear_model.build()
    results = [deepcopy(model.state_dict())]
    for _ in range(ROUNDS):
        total, states = 0, []
        for client in range(CLIENTS):
            local = deepcopy(model)
            start = [parameter.detach().clone() for parameter in local.parameters()]
            inputs, targets = linear_model.data(client)
            optimizer = torch.optim.SGD(local.parameters(), lr=RATE)
            local.train()
            for _ in range(3):
                optimizer.zero_grad()
                loss = (local(inputs).squeeze(1) - targets).square().mean()
                for parameter, anchor in zip(local.parameters(), start, strict=True):
                    loss = loss + mu / 2 * (parameter - anchor).square().sum()
                loss.backward()
                optimizer.step()
            states.append((len(inputs), local.state_dict()))
            total += len(inputs)
        mean = {name: sum(state[name].double() * (weight / total) for weight, state in states) for name in states[0][1]}
        model.load_state_dict({name: torch.as_tensor(value).round() if "num_batches" in name else value
                               for name, value in mean.items()})  # fmt: skip
        results.append(deepcopy(model.state_dict()))
    return results


@pytest.mark.parametrize(
    ("strategy", "mu"),
    [({"algorithm": "FedAvg"}, 0.0), ({"algorithm": "FedProx", "parameters": {"mu": "0.5"}}, 0.5)],
    ids=["FedAvg", "FedProx"],
)
def test_round_by_round(
    federation: Callable[..., Federation], script: Path, strategy: dict[str, object], mu: float
) -> None:
    job = federation(CLIENTS, ROUNDS, strategy=strategy, aggregator={"checkpoint": {"keep": 100}})
    job.start_aggregator()
    clients = [job.start_client(script, index) for index in range(CLIENTS)]
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    for number, expected in enumerate(reference(mu)):
        actual = load_file(job.state / "checkpoints" / f"round-{number:06d}.safetensors")
        assert list(actual) != []
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=f"round {number}, {name}")
    # Evaluations are weighted by the clients' num_examples: (0*1 + 1*2 + 2*3) / 6.
    metrics = {metric.name: (metric.value, metric.round) for metric in status.metrics}
    assert metrics["score"] == (pytest.approx(8 / 6), ROUNDS)
    assert metrics["train_loss"][1] == ROUNDS
    final = torch.load(job.state / "model.pt", weights_only=True)
    linear_model.build().load_state_dict(final)
