"""Deletion that leaves a job's objects behind (``kubectl delete --cascade=orphan``)."""

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, manifest


def test_an_orphaning_deletion_cancels_the_array_and_the_next_job_names_what_is_left(
    namespace: Namespace, operator: Operator, bridge: FakeBridge
) -> None:
    job = manifest("demo", cloud=1)
    job["spec"]["pools"].append(bridge.pool(namespace.name))
    namespace.apply(job)
    namespace.until("AggregatorReady", "True/AggregatorRunning")
    eventually(lambda: bridge.pools, "the pool is submitted")
    namespace.kubectl("delete", "fj", "demo", "--cascade=orphan", "--timeout=120s")
    # With --cascade=orphan, Kubernetes keeps the objects; the operator must still cancel the pools.
    assert bridge.cancelled == list(bridge.pools)
    left = {item["metadata"]["uid"] for item in namespace.items("pod")}
    assert len(left) == 2
    namespace.apply(manifest("demo", cloud=1))
    eventually(
        lambda: "ConfigMap/demo-job (of the job demo)" in str(namespace.status().get("conditions")),
        "the next job says what is in its way",
        show=namespace.status,
    )
    assert {item["metadata"]["uid"] for item in namespace.items("pod")} == left
