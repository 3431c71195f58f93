"""A federation that shares only some tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Federation, eventually

SCRIPT = Path(__file__).with_name("adapters.py")


@pytest.mark.parametrize("algorithm", ["FedAvg", "SCAFFOLD"])
def test_only_the_adapters_travel(federation: Callable[..., Federation], algorithm: str) -> None:
    compression = {} if algorithm == "SCAFFOLD" else {"compression": {"upload": "Int8"}}
    job = federation(2, 3, strategy={"algorithm": algorithm}, **compression)
    job.start_aggregator()
    clients = [job.start(f"client-{k}", [SCRIPT], job.client_environment(k)) for k in range(2)]
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0") + job.log("client-1")
    final = torch.load(job.state / "model.pt", weights_only=True)
    assert list(final) == ["0.lora_a", "0.lora_b"]
    began = [(job.directory / f"began-{k}").read_text() for k in range(2)]
    assert began[0] == began[1]
    assert len(set(began[0].split()[1::2])) == 3  # and they were trained


def test_a_pattern_that_matches_nothing_is_in_the_status(federation: Callable[..., Federation]) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start("client-0", [SCRIPT], job.client_environment(0, PATTERNS="adapter.*"))
    assert client.wait() == 1
    failure = eventually("the failure is known", lambda: job.status().pools[0].failures)[0]
    assert failure.message.startswith(
        "ScriptError: parameters: 'adapter.*' matches none of the model's tensors: 0.lora"
    )
