"""Several served namespaces, each with its own Role: one loses its rights, or is deleted, while jobs run."""

import json
import urllib.request

from isthmus_contracts.pb import bridge_pb2 as pb

from .bridge import FakeBridge
from .cluster import ACCOUNT, Namespace, Operator, eventually, kubectl, manifest


def refused(operator: Operator) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}/readyz", timeout=5) as answer:
        return dict(json.loads(answer.read())["refused"])


def alive(operator: Operator) -> bool:
    return operator.process is not None and operator.process.poll() is None


def test_a_namespace_that_revokes_the_rights_is_reported_and_the_other_is_served(
    namespace: Namespace, second: Namespace, both: Operator
) -> None:
    second.apply(manifest("before"))
    second.until("AggregatorReady", "True/AggregatorRunning", "before")
    role = second.kubectl("get", "rolebinding", ACCOUNT, "-o", "json")
    second.kubectl("delete", "rolebinding", ACCOUNT)
    eventually(lambda: second.name in refused(both), "readiness tells of it", 400)
    namespace.apply(manifest("during"))
    namespace.until("AggregatorReady", "True/AggregatorRunning", "during")
    binding = json.loads(role)
    binding["metadata"] = {"name": ACCOUNT, "namespace": second.name}
    second.apply(binding)
    eventually(lambda: not refused(both), "it is served again", 120)
    second.apply(manifest("after"))
    second.until("AggregatorReady", "True/AggregatorRunning", "after")
    assert alive(both)


def test_a_namespace_with_running_jobs_can_be_deleted(
    namespace: Namespace, second: Namespace, both: Operator, bridge: FakeBridge
) -> None:
    """Kubernetes may delete the operator's Role before its jobs."""
    patch = {"spec": {"allowedNamespaces": [second.name]}}
    kubectl("patch", "hpcsite", namespace.name, "--type=merge", "-p", json.dumps(patch))
    second.apply(manifest("cloud"))
    second.apply(manifest("site", cloud=0, pools=[bridge.pool(namespace.name)]))
    second.until("AggregatorReady", "True/AggregatorRunning", "cloud")
    eventually(lambda: bridge.pools, "the pool is submitted")
    bridge.move(pb.Pool.RUNNING, running=2, queued=0)
    assert not second.get("fj", "cloud")["metadata"].get("finalizers")
    assert second.get("fj", "site")["metadata"]["finalizers"] == ["isthmus.dev/cleanup"]
    kubectl("delete", "namespace", second.name, "--wait=false")
    eventually(
        lambda: "NotFound" in kubectl("get", "namespace", second.name, check=False), "the namespace is gone", 240
    )
    assert sorted(bridge.cancelled) == sorted(bridge.pools)
    assert alive(both)
    namespace.apply(manifest("other"))
    namespace.until("AggregatorReady", "True/AggregatorRunning", "other")


def test_a_user_of_jobs_alone_cannot_read_another_jobs_key(namespace: Namespace, operator: Operator) -> None:
    namespace.apply(manifest("victim"))
    namespace.until("AggregatorReady", "True/AggregatorRunning", "victim")
    thief = manifest("thief", backoffLimit=0)
    pod = thief["spec"]["pools"][0]["cloud"]["template"]["spec"]
    pod["volumes"] = [{"name": "loot", "secret": {"secretName": "victim-ca"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "loot", "mountPath": "/loot"}]
    thief["spec"]["task"]["command"] = ["sh", "-c", "cat /loot/tls.key; exit 1"]
    namespace.apply(thief)
    namespace.until("Accepted", "False/TemplateNotAllowed", "thief")
    assert "the Secret 'victim-ca' is Isthmus' own" in namespace.status("thief")["message"]
    assert not [name for name in namespace.names("pod") if name.startswith("thief")]
