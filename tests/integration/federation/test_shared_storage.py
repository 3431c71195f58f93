"""Federations of models whose names share memory: one tensor is sent, and the result has all names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Federation, eventually

Make = Callable[..., Federation]

SCRIPT = Path(__file__).with_name("tied.py")
NAMES = {"wte.weight", "head.weight", "encode.weight", "encode.bias", "decode.weight", "decode.bias"}
PRIVACY = {"differentialPrivacy": {"clipNorm": "0.5", "noiseMultiplier": "4", "delta": "1e-5"}}


@pytest.mark.parametrize(
    "spec",
    [
        {"compression": {"upload": "TopK+Int8", "download": "Int8"}},
        {"compression": {"upload": "TopK+Int4+Zstd"}, "strategy": {"algorithm": "FedAdam"}},
        {"strategy": {"algorithm": "SCAFFOLD"}},
        {"strategy": {"algorithm": "CoordinateMedian"}},
        {"privacy": PRIVACY},
    ],
    ids=["quantised", "adaptive", "SCAFFOLD", "median", "private"],
)
def test_what_shares_memory_stays_one(federation: Make, spec: dict[str, Any]) -> None:
    job = federation(2, 6, **spec)
    job.start_aggregator()
    clients = [job.start(f"client-{k}", [SCRIPT], job.client_environment(k, HOLD="4")) for k in range(2)]
    job.wait_for_round(3)
    job.kill_aggregator()
    job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0")
    (newest,) = sorted((job.state / "checkpoints").glob("round-000006.safetensors"))
    assert load_file(newest).keys() == {"decode.bias", "encode.bias", "encode.weight", "head.weight"}
    plain = torch.load(job.state / "model.pt", weights_only=True)
    for state in (plain, load_file(job.state / "model.safetensors")):
        assert state.keys() == NAMES
        assert torch.equal(state["wte.weight"], state["head.weight"])
        assert torch.equal(state["decode.weight"], state["encode.weight"].t())
    assert plain["wte.weight"].data_ptr() == plain["head.weight"].data_ptr()
    first, last = (torch.load(job.directory / f"began-0-{k}.pt", weights_only=True) for k in (1, 6))
    assert last.keys() == NAMES
    assert not torch.equal(first["wte.weight"], last["wte.weight"])
    assert torch.equal(last["decode.weight"], last["encode.weight"].t())


@pytest.mark.parametrize("untied", [0, 1])
def test_a_client_that_shares_otherwise_fails_with_a_line(federation: Make, untied: int) -> None:
    job = federation(2, 2)
    job.start_aggregator()
    environments = [job.client_environment(k, **({"UNTIED": "1"} if k == untied else {})) for k in range(2)]
    job.start("client-0", [SCRIPT], environments[0])
    eventually("the first client has connected", lambda: job.status().pools[0].connected)
    job.start("client-1", [SCRIPT], environments[1])
    failure = eventually("the failure is known", lambda: job.status().pools[0].failures)[0]
    assert "decode.weight does" in failure.message
    assert "share memory with encode.weight (tied weights) at this client, and does" in failure.message
