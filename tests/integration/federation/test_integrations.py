"""The callbacks for Lightning and Transformers with real trainers in real federations."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Federation, eventually
from .subprocess_job import Forked

Make = Callable[..., Federation]
HERE = Path(__file__).parent
TRAINERS = ["lightning", "transformers"]
pytestmark = pytest.mark.timeout(900)


def start(job: Federation, trainer: str, index: int = 0, **env: str) -> Forked:
    pytest.importorskip(trainer, reason=f"needs {trainer}: pip install isthmus[{trainer}]")
    script = HERE / f"with_{trainer}.py"
    return job.start(f"client-{index}", [script], {**job.client_environment(index), **env})


def final(job: Federation) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(job.state / "model.pt", weights_only=True)
    return state


@pytest.mark.parametrize(("trainer", "accumulate"), [("lightning", "1"), ("lightning", "2"), ("transformers", "2")])
def test_a_round_trains_what_a_plain_loop_would(federation: Make, trainer: str, accumulate: str) -> None:
    """SCAFFOLD, with which optimizers must be wrapped and steps counted, also with gradient accumulation."""
    results = []
    for plain in ("", "yes"):
        job = federation(2, 2, strategy={"algorithm": "SCAFFOLD"})
        job.start_aggregator()
        first = start(job, trainer, 0, PLAIN=plain, ACCUMULATE=accumulate)
        eventually("client 0 is there", lambda job=job: job.status().pools[0].connected == 1)  # type: ignore[misc]
        clients = [first, start(job, trainer, 1, PLAIN=plain, ACCUMULATE=accumulate)]
        status = job.wait_for_completion()
        assert [client.wait() for client in clients] == [0, 0], job.log("client-0") + job.log("client-1")
        results.append((final(job), {metric.name: metric.value for metric in status.metrics}["train_loss"]))
    for name, tensor in results[1][0].items():
        torch.testing.assert_close(results[0][0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_signal_ends_training_and_what_was_trained_counts(federation: Make, trainer: str) -> None:
    job = federation(1, 5)
    job.start_aggregator()
    client = start(job, trainer, ENDLESS="yes")
    eventually("it trains", (job.directory / "trains-0").exists)
    client.send_signal(signal.SIGTERM)
    assert client.wait() == 143, job.log("client-0")
    job.wait_for_round(1)
