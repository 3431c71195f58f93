"""Secure aggregation of a cluster and a site: the bridge's batch scripts start real clients; only Slurm is fake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus_bridge.audit import chain
from isthmus_bridge.parties import signing_root
from isthmus_contracts.pb import bridge_pb2 as bridge
from isthmus_contracts.wire.parties import Trust, issue, new_root, write_party_files
from tests.support.fake_slurm import KEY, World, checked_world

from .conftest import POOL, SERVER_NAME, UID, Federation
from .secure_parties import SECURE

Make = Callable[..., Federation]
HPC = "hpc"
POOLS = [
    {"name": POOL, "replicas": 2, "cloud": {}},
    {"name": HPC, "replicas": 2, "hpc": {"siteRef": {"name": "test"}, "environment": "plain"}},
]
CLUSTER_KEY, CLUSTER_ROOT = new_root()


class SiteWithTasks:
    """A site that demands secure aggregation with the cluster, and the tasks of its one pool."""

    def __init__(self, world: World, root: str) -> None:
        self.world, self.root = world, root
        self._tasks: list[subprocess.Popen[bytes]] = []

    @property
    def files(self) -> Path:
        """Directory of the pool."""
        return self.world.policy.run_dir / KEY

    def submit(self, job: Federation, script: Path, replicas: int, first: int) -> None:
        """Request the pool as the operator does, and start its tasks as Slurm does."""
        credentials = job.credentials(pool=HPC)
        federation = bridge.Federation(
            endpoint=f"127.0.0.1:{job.port}", server_name=SERVER_NAME, ca_certificate=credentials.ca,
            certificate=credentials.certificate, private_key=credentials.key,
        )  # fmt: skip
        self.world.ensure(
            job_uid=UID, pool=HPC, replicas=replicas, first_client=first, total_clients=first + replicas,
            command=[sys.executable, str(script)], federation=federation,
            privacy=bridge.Privacy(secure_aggregation=True),
        )  # fmt: skip
        self.world.tick()
        array = self.world.array()
        array.states = ["RUNNING"] * replicas
        for index in range(replicas):
            env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": str(array.id)}
            with (self.files / "logs" / f"{index}.log").open("wb") as log:
                self._tasks.append(
                    subprocess.Popen(["/bin/bash", self.files / "batch.sh"], stdout=log, stderr=log, env=env)
                )

    def end(self) -> list[int]:
        """Wait until the tasks have ended, report that as Slurm does, and return their exit codes."""
        codes = [task.wait(600) for task in self._tasks]
        array = self.world.array()
        array.states = ["FAILED" if code else "COMPLETED" for code in codes]
        array.exit_codes = codes
        self.world.tick(times=3)
        return codes

    def log(self, index: int) -> str:
        """Return the log of a task."""
        return (self.files / "logs" / f"{index}.log").read_text()

    def left(self) -> list[dict[str, Any]]:
        """Return what left according to the audit log, whose chain must be whole."""
        lines = self.world.policy.audit_path.read_bytes().splitlines()
        assert chain.verify(lines).faults == ()
        return [record for record in map(json.loads, lines) if record["event"] == "left"]

    def close(self) -> None:
        """Kill tasks that are left."""
        for task in self._tasks:
            task.kill()
            task.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteWithTasks]:
    root, _ = signing_root.make(tmp_path)
    (tmp_path / "tls").mkdir()
    signing_root.install(tmp_path, tmp_path / "tls")
    rules = {"required": True, "min_parties": 2, "roots": {"cloud": CLUSTER_ROOT}}
    with checked_world(tmp_path, privacy={"secure_aggregation": rules}) as world:
        found = SiteWithTasks(world, root)
        yield found
        found.close()


def test_the_clusters_and_the_sites_clients_sum_up_and_the_site_knows_what_left(
    federation: Make, script: Path, site: SiteWithTasks
) -> None:
    job = federation(4, 2, pools=POOLS, privacy={"secureAggregation": {**SECURE["secureAggregation"], "minParties": 2}})
    job.start_aggregator()
    trust = Trust(roots={"cloud": CLUSTER_ROOT, "test": site.root}, min_parties=2, required=True)
    key, credential = issue(CLUSTER_KEY, "cloud", UID, POOL)
    pods = []
    for index in range(2):
        environment = {**job.client_environment(index), "ISTHMUS_CLIENTS": "4"}
        write_party_files(job.directory / f"client-{index}-0", key, credential, trust)
        pods.append(job.start(f"client-{index}-0", [script], environment))
    site.submit(job, script, replicas=2, first=2)
    status = job.wait_for_completion()
    assert [pod.wait() for pod in pods] == [0, 0], job.log("client-0-0")
    assert site.end() == [0, 0], site.log(0)
    assert status.completed_rounds == 2
    assert (status.secure.survivors, status.secure.parties) == (4, 2)
    assert site.world.phase() == "SUCCEEDED"
    assert not (site.files / "tls").exists()
    left = site.left()
    updates = [record for record in left if record["what"] == "update"]
    assert sorted((record["index"], record["round"]) for record in updates) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert {record["protection"] for record in updates} == {"secure-aggregation"}
    assert {record["what"] for record in left if record["protection"] == "none"} <= {"initial-weights"}


def test_the_clients_of_a_site_that_would_be_alone_refuse(federation: Make, script: Path, site: SiteWithTasks) -> None:
    job = federation(3, 2, pools=[{**POOLS[1], "replicas": 3}], privacy=SECURE)
    job.start_aggregator()
    site.submit(job, script, replicas=3, first=0)
    assert site.end() == [1, 1, 1]
    for index in range(3):
        assert "isthmus.FederationError: secure aggregation refused (parties): " in site.log(index)
    assert not [record for record in site.left() if record["what"] == "update"]
    pool = site.world.pool()
    assert bridge.Pool.Phase.Name(pool.phase) == "FAILED"
    assert "secure aggregation refused (parties)" in pool.tasks[0].log_tail
    assert job.status().completed_rounds == 0


def test_the_sites_clients_refuse_an_aggregator_that_does_not_mask(
    federation: Make, script: Path, site: SiteWithTasks
) -> None:
    """The operator has told the site that the job is secure."""
    job = federation(2, 2, pools=[POOLS[1]])
    job.start_aggregator()
    site.submit(job, script, replicas=2, first=0)
    assert site.end() == [1, 1]
    assert "this site requires secure aggregation (trust.json: required)" in site.log(0)
    refused = [record for record in site.left() if record["decision"] == "refused"]
    assert {(record["index"], record["what"], record["size"]) for record in refused} == {
        (0, "update", 0), (1, "update", 0),
    }  # fmt: skip
    assert not [record for record in site.left() if record["what"] == "update" and record["decision"] == "sent"]
