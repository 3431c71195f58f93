"""A job's objects: edits and deletions are put back, names do not collide, and an offered claim is adopted."""

import json
from typing import Any

from .cluster import Namespace, Operator, eventually, manifest

KINDS = ("service", "configmap", "secret", "persistentvolumeclaim", "networkpolicy", "poddisruptionbudget")


def versions(namespace: Namespace) -> dict[str, str]:
    """Return the resource version of each of the operator's objects."""
    return {
        f"{kind}/{item['metadata']['name']}": item["metadata"]["resourceVersion"]
        for kind in KINDS
        for item in namespace.items(kind)
    }


def patch(namespace: Namespace, kind: str, name: str, content: dict[str, Any]) -> None:
    namespace.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(content))


def label(namespace: Namespace, kind: str, name: str, key: str) -> str:
    return str(namespace.get(kind, name)["metadata"].get("labels", {}).get(key, ""))


def test_edited_and_deleted_objects_are_put_back_and_the_rest_is_left_alone(
    namespace: Namespace, operator: Operator
) -> None:
    job = manifest()
    job["spec"]["aggregator"] |= {"disruptionBudget": "Protect", "expose": {"type": "NodePort"}}
    namespace.apply(job)
    namespace.until("AggregatorReady", "True/AggregatorRunning")
    service = namespace.get("service", "demo-aggregator")["spec"]
    rules = namespace.get("networkpolicy", "demo-aggregator")["spec"]

    patch(namespace, "service", "demo-aggregator", {"spec": {"selector": {"app": "another"}}})
    patch(namespace, "networkpolicy", "demo-aggregator", {"spec": {"ingress": [{}]}})
    patch(namespace, "configmap", "demo-job", {"metadata": {"labels": {"isthmus.dev/job-uid": None}}})
    patch(namespace, "secret", "demo-ca", {"metadata": {"ownerReferences": []}})
    namespace.kubectl("delete", "pdb", "demo-aggregator")
    eventually(lambda: namespace.get("service", "demo-aggregator")["spec"] == service, "the Service is as it was")
    eventually(lambda: namespace.get("networkpolicy", "demo-aggregator")["spec"] == rules, "so is the policy")
    eventually(lambda: namespace.get("poddisruptionbudget", "demo-aggregator"), "the budget is made again")
    eventually(lambda: label(namespace, "configmap", "demo-job", "isthmus.dev/job-uid"), "the label is back")
    eventually(lambda: namespace.get("secret", "demo-ca")["metadata"].get("ownerReferences"), "the owner is back")

    def reported() -> bool:
        words = " ".join(namespace.events("Restored"))
        return all(name in words for name in ("Service", "NetworkPolicy", "ConfigMap", "Secret", "Disruption"))

    eventually(reported, "events say so")
    # Once the next edit is reverted, everything has been compared again, and the other objects were not written.
    settled = versions(namespace)
    patch(namespace, "service", "demo-aggregator", {"metadata": {"labels": {"isthmus.dev/job": None}}})
    eventually(lambda: label(namespace, "service", "demo-aggregator", "isthmus.dev/job"), "the label is back")
    after = versions(namespace)
    changed = {key for key in settled if settled[key] != after[key]}
    # Other controllers write the statuses of the last two.
    others = {"persistentvolumeclaim/demo-checkpoints", "poddisruptionbudget/demo-aggregator"}
    assert changed - others == {"service/demo-aggregator"}
    assert namespace.condition("AggregatorReady") == "True/AggregatorRunning"


def test_jobs_whose_names_would_collide_run_side_by_side(namespace: Namespace, operator: Operator) -> None:
    first, second = manifest("a"), manifest("a-b")
    first["spec"]["pools"][0]["name"], second["spec"]["pools"][0]["name"] = "b-c", "c"
    namespace.apply(first, second)
    for name in ("a", "a-b"):
        namespace.until("AggregatorReady", "True/AggregatorRunning", name)
    pods = {"a-b-c-0-0", "a-b-c-b88f83c840-0-0", "a-b-c-1-0", "a-b-c-b88f83c840-1-0"}
    eventually(lambda: pods <= namespace.running(), "the clients of both run")
    assert namespace.get("fj", "a")["metadata"]["annotations"]["isthmus.dev/names"] == "hashed"
    assert "isthmus.dev/names" not in namespace.get("fj", "a-b")["metadata"]["annotations"]
    assert {"a-b-c-tls", "a-b-c-b88f83c840-tls"} <= namespace.names("secret")


def test_a_restored_claim_is_adopted_once_it_is_offered(namespace: Namespace, operator: Operator) -> None:
    labels = {"isthmus.dev/job": "demo", "isthmus.dev/job-uid": "of-an-earlier-job"}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "demo-checkpoints", "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}},
    }
    namespace.apply(claim, manifest())
    uid = namespace.get("persistentvolumeclaim", "demo-checkpoints")["metadata"]["uid"]
    offer = "kubectl annotate pvc demo-checkpoints isthmus.dev/adopt=demo"
    eventually(lambda: offer in namespace.status().get("message", ""), "the status says what to do")
    assert not namespace.names("pod")
    namespace.kubectl("annotate", "pvc", "demo-checkpoints", "isthmus.dev/adopt=demo")
    namespace.until("AggregatorReady", "True/AggregatorRunning")
    adopted = namespace.get("persistentvolumeclaim", "demo-checkpoints")["metadata"]
    job = namespace.get("fj", "demo")["metadata"]["uid"]
    assert (adopted["uid"], adopted["labels"]["isthmus.dev/job-uid"]) == (uid, job)
    assert [owner["uid"] for owner in adopted["ownerReferences"]] == [job]
    assert adopted["annotations"]["isthmus.dev/adopted-from"] == "of-an-earlier-job"
    assert "isthmus.dev/adopt" not in adopted["annotations"]
    eventually(lambda: namespace.events("Adopted"), "an event says so")
    # From now on the job owns it.
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    namespace.until_bare()
