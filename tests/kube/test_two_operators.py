"""Two operators of different scopes and cluster names that could serve the same jobs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, kubectl, manifest

GET_CALLS = 8  # seen at the pool, by the operator that serves it


@pytest.fixture
def tenant(both: Operator, second: Namespace, tmp_path: Path) -> Iterator[Operator]:
    """Yield another operator, of another cluster name, that serves the second namespace only."""
    process = Operator(second.name, both.config, tmp_path / "tenant.log", ("--cluster", "tenants"))
    try:
        process.start()
        yield process
    finally:
        process.stop()
        print(process.log.read_text(encoding="utf-8"))


def counted(namespace: Namespace) -> dict[str, int]:
    """Return the number of events of each reason about FederatedJobs, repetitions included."""
    counts: dict[str, int] = {}
    for event in namespace.items("event", ""):
        if event["involvedObject"]["kind"] == "FederatedJob":
            counts[event["reason"]] = counts.get(event["reason"], 0) + (event.get("count") or 1)
    return counts


def owner(namespace: Namespace) -> dict[str, Any]:
    return dict(json.loads(namespace.get("fj", "demo")["metadata"]["annotations"]["isthmus.dev/operator"]))


def test_one_of_two_operators_serves_a_job_and_the_other_says_so_once(
    namespace: Namespace, second: Namespace, tenant: Operator, bridge: FakeBridge
) -> None:
    patch = {"spec": {"allowedNamespaces": [second.name]}}
    kubectl("patch", "hpcsite", namespace.name, "--type=merge", "-p", json.dumps(patch))
    job = manifest("demo", cloud=1)
    job["spec"]["pools"].append(bridge.pool(namespace.name))
    second.apply(job)
    second.until("AggregatorReady", "True/AggregatorRunning")
    eventually(lambda: bridge.pools, "the pool is submitted")
    bridge.move(pb.Pool.RUNNING, running=2, queued=0)
    eventually(lambda: second.pool("lumi").get("queued") == 0, "the status shows that its tasks run")
    eventually(lambda: counted(second).get("ServedByAnother"), "the other one says so")
    first, before = owner(second), counted(second)
    uids = {item["metadata"]["uid"] for item in second.items("pod")}
    calls = bridge.get_calls
    eventually(lambda: bridge.get_calls > calls + GET_CALLS, "time has gone by")
    # Nothing is created twice or undone, and no further events appear.
    assert len(bridge.pools) == 1 and not bridge.cancelled
    assert {item["metadata"]["uid"] for item in second.items("pod")} == uids and len(uids) == 2
    assert owner(second)["operator"] == first["operator"]
    assert counted(second) == before
    assert before["ServedByAnother"] == before["Valid"] == 1
    # The end of the job is reported by the owner, too.
    second.kubectl("delete", "fj", "demo", "--timeout=120s")
    second.until_bare()
    assert bridge.cancelled == list(bridge.pools)
    assert counted(second)["ServedByAnother"] == 1
