"""Secure aggregation over a cluster and a site whose policy demands it, with two parties."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import CLUSTER, SITE, Platform, eventually, run, say

pytestmark = pytest.mark.timeout(1800)

SECURE = {"secureAggregation": {"minParties": 2, "maxExamples": 2000, "metrics": {"loss": "20", "eval_loss": "20"}}}


@pytest.fixture
def demanding(platform: Platform) -> Iterator[Platform]:
    """Let the site demand secure aggregation with the cluster's clients, as its admin does."""

    def signing() -> dict[str, str]:
        shown: dict[str, str] = json.loads(
            run("kubectl", "get", "hpcsite", SITE, "-o", "jsonpath={.status.signing}") or "{}"
        )
        return shown if "clusterRoot" in shown else {}

    roots = eventually("the HPCSite shows the roots", signing)
    assert (roots["clusterParty"], roots["party"]) == (CLUSTER, SITE)
    rules = {"required": True, "min_parties": 2, "roots": {CLUSTER: roots["clusterRoot"]}}
    with platform.slurm.demanding({"secure_aggregation": rules}):
        yield platform


def events(platform: Platform, job: str, event: str) -> list[dict[str, Any]]:
    lines = platform.slurm.audit("--json", "--job", f"{platform.namespace}/{job}", "--event", event)
    return [json.loads(line) for line in lines.splitlines()]


def reason(platform: Platform, job: str, pool: str) -> str:
    pools = platform.status(job).get("pools", [])
    return str(next((one.get("reason", "") for one in pools if one["name"] == pool), ""))


def test_two_parties_train_and_the_aggregator_sees_sums_only(demanding: Platform, job: str) -> None:
    demanding.apply(demanding.manifest(job, rounds=5, privacy=SECURE))
    demanding.wait_for_completion(job)
    assert demanding.status(job)["rounds"] == {"current": 5, "completed": 5, "total": 5}
    condition = demanding.condition(job, "SecurelyAggregated")
    assert (condition["status"], condition["reason"]) == ("True", "SumOpened"), condition
    assert "2 parties" in condition["message"]
    say(condition["message"])

    assert [record["state"] for record in eventually("the pool has ended", lambda: events(demanding, job, "ended"))]
    left = events(demanding, job, "left")
    updates = [record for record in left if record["what"] == "update"]
    assert {(record["index"], record["round"]) for record in updates} >= {
        (index, number) for index in (0, 1) for number in range(1, 6)
    }
    assert {(record["protection"], record["decision"]) for record in updates} == {("secure-aggregation", "sent")}
    assert all(len(record["sha256"]) == 64 and record["size"] for record in updates)
    assert {record["what"] for record in left if record["protection"] == "none"} <= {"initial-weights"}
    say(demanding.slurm.audit("--job", f"{demanding.namespace}/{job}"))
    say(demanding.slurm.audit("--verify"))


def test_the_same_job_without_it_is_denied_by_name(demanding: Platform, job: str) -> None:
    demanding.apply(demanding.manifest(job, rounds=5))
    rule = "privacy.secure_aggregation.required"
    eventually("the denial is in the pool's status", lambda: rule in reason(demanding, job, "hpc"))
    assert "privacy.secureAggregation is not set in the manifest" in reason(demanding, job, "hpc")
    assert not demanding.slurm.squeue()
    (denied,) = events(demanding, job, "denied")
    assert denied["rule"] == rule
    assert not events(demanding, job, "accepted")


def test_clients_that_would_be_alone_refuse(demanding: Platform, job: str) -> None:
    manifest = demanding.manifest(
        job, rounds=5, backoffLimit=0, selection__minClients=3, stragglers__minUpdates=3,
        privacy={"secureAggregation": {**SECURE["secureAggregation"], "minParties": 1}},
    )  # fmt: skip
    manifest["spec"]["pools"] = [{**manifest["spec"]["pools"][1], "replicas": 3}]
    demanding.apply(manifest)
    eventually("the refusal is in the pool's status", lambda: "refused (parties)" in reason(demanding, job, "hpc"), 600)
    say(reason(demanding, job, "hpc"))
    eventually("the pool has ended", lambda: events(demanding, job, "ended"))
    assert not [record for record in events(demanding, job, "left") if record["what"] == "update"]
    assert demanding.completed(job) == 0
