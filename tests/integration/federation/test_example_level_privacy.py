"""The example script with DP-SGD in a federation: it learns, and its account is the job's metric."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from opacus.accountants import PRVAccountant

from isthmus_examples.digits_dp_sgd import epsilon, steps_of

from .conftest import Federation
from .test_faults import records

SCRIPT = Path(sys.modules["isthmus_examples.digits_dp_sgd"].__file__ or "")
CONFIG = {"localEpochs": "2", "noiseMultiplier": "1.2", "maxGradNorm": "1", "learningRate": "0.5"}
TASK = {"image": "unused", "command": ["python"], "config": CONFIG}


@pytest.mark.parametrize("algorithm", ["FedAvg", "SCAFFOLD"])
def test_it_learns_and_reports_its_epsilon(federation: Callable[..., Federation], algorithm: str) -> None:
    job = federation(3, 6, task=TASK, strategy={"algorithm": algorithm})
    job.start_aggregator()
    clients = [job.start_client(SCRIPT, index) for index in range(3)]
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0, 0], job.log("client-0-0")
    for record in records(job):
        assert record["metrics"]["train_epsilon"] == pytest.approx(epsilon(record["round"], 2, 1.2), rel=1e-6)
    assert records(job)[-1]["metrics"]["accuracy"] > 0.6


def test_the_account_bounds_the_tight_one() -> None:
    tight = PRVAccountant()
    tight.history = [(1.2, 0.1, steps_of(2) * 6)]
    exact = tight.get_epsilon(1e-5)
    assert exact - 0.02 <= epsilon(6, 2, 1.2) <= 1.3 * exact
