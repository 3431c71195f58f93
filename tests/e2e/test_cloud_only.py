"""A job without an HPC pool, which also runs on a cluster without a site."""

import pytest

from .conftest import Platform, eventually

pytestmark = pytest.mark.timeout(1800)


def test_a_cloud_only_job_completes(cluster: Platform, job: str) -> None:
    manifest = cluster.manifest(job, rounds=3, selection__minClients=2, stragglers__minUpdates=2)
    del manifest["spec"]["pools"][1]
    cluster.apply(manifest)
    cluster.wait_for_completion(job)
    assert cluster.status(job)["rounds"]["completed"] == 3
    cluster.delete(job)


def test_a_script_that_raises_in_a_pod(cluster: Platform, job: str) -> None:
    manifest = cluster.manifest(job, backoffLimit=0, selection__minClients=2, stragglers__minUpdates=2)
    del manifest["spec"]["pools"][1]
    manifest["spec"]["task"]["command"] = ["python", "-c", "raise ValueError('no such column: age')"]
    cluster.apply(manifest)

    def failed() -> dict[str, str]:
        condition: dict[str, str] = cluster.condition(job, "Failed")
        return condition if condition.get("status") == "True" else {}

    condition = eventually("the job has failed", failed)
    assert condition["reason"] == "QuorumImpossible"
    (pool,) = cluster.status(job)["pools"]
    assert pool["failed"] >= 1  # one failure makes the quorum impossible, so nothing waits for the other client
    assert "ValueError: no such column: age" in pool["reason"]
