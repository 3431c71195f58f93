"""Renewed certificates reach running Slurm tasks: real Slurm, real bridge, real aggregator."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb

from .aggregator import UID, Aggregator
from .slurm_site import Site, ensure, over, running, spec, tail, until

if TYPE_CHECKING:
    from lab import Lab

ROUNDS, BEFORE = 6, 3
SCRIPT = Path(__file__).parents[1] / "integration" / "federation" / "linear_model.py"


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    with Aggregator(tmp_path, "127.0.0.1", ROUNDS) as one:
        yield one


@pytest.fixture
def root_site(lab: "Lab") -> Iterator[Site]:
    """Yield a bridge whose tasks may use this Python, which has torch."""
    one = Site(Path(tempfile.mkdtemp(prefix="bridge-test-")), None, Path(sys.executable), {})
    yield one
    one.close()


def test_tasks_that_run_get_the_renewed_certificate_and_lose_no_round(root_site: Site, aggregator: Aggregator) -> None:
    operator, key = root_site.start(), root_site.key()
    wanted = spec(
        job_uid=UID, replicas=2, first_client=0, total_clients=2, environment="plain", memory_mib=500,
        command=[sys.executable, str(SCRIPT)],
        env={"PATH": os.environ["PATH"], "PAUSE": "0.2", "HOLD": str(BEFORE + 1)},
    )  # fmt: skip
    wanted.federation.CopyFrom(aggregator.federation(via_bridge=False))
    ensure(operator, key, wanted)
    running(operator, key)
    until(lambda: aggregator.rounds() >= BEFORE, "some rounds are over", 300)
    # Replace the CA, which is harder than any renewal: all old certificates become invalid.
    aggregator.kill()
    aggregator.new_authority()
    fresh = aggregator.credentials()
    operator.RenewCredentials(
        pb.RenewCredentialsRequest(
            key=key, ca_certificate=fresh.ca, certificate=fresh.certificate, private_key=fresh.key
        ),
        timeout=60,
    )
    aggregator.start()
    work = root_site.folder / "run" / key / "work"
    for index in range(2):
        (work / str(index) / "go").touch()
    pool = over(operator, key, 400)
    logs = [tail(operator, key, index) for index in range(2)]
    assert pb.Pool.Phase.Name(pool.phase) == "SUCCEEDED", (pool, logs)
    assert all("certificate was renewed" in log for log in logs), logs
    assert aggregator.rounds() == ROUNDS
    for index in range(2):
        trained = (work / str(index) / f"trained-{index}").read_text().split()
        assert trained == [str(number) for number in range(1, ROUNDS + 1)], "a round was trained twice, or not at all"
    assert len(root_site.arrays(key)) <= 1
