"""Disruptions on a real kubelet: drains, evictions, the OOM killer, a failing API server or etcd."""

import os
import signal
from collections.abc import Iterator

import pytest

from lab import Lab

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, kubectl, manifest

PODS = {"demo-aggregator", "demo-cloud-0-0", "demo-cloud-1-0"}


@pytest.fixture
def running(namespace: Namespace, operator: Operator) -> Namespace:
    """Start a job whose clients have limits."""
    job = manifest(backoffLimit=3)
    (client,) = job["spec"]["pools"][0]["cloud"]["template"]["spec"]["containers"]
    client["resources"] = {"limits": {"memory": "32Mi", "ephemeral-storage": "4Mi"}, "requests": {"cpu": "1m"}}
    namespace.apply(job)
    eventually(lambda: namespace.running() >= PODS, "the pods run", 180)
    namespace.until("AggregatorReady", "True/AggregatorRunning")
    return namespace


@pytest.fixture
def lab() -> Lab:
    """Return the lab, the only place where tests can stop daemons."""
    if "ISTHMUS_LAB" not in os.environ:
        pytest.skip("stops the cluster's own daemons: only in the lab")
    return Lab()


@pytest.fixture
def node(running: Namespace) -> Iterator[str]:
    """Yield the aggregator's node, and make it schedulable again afterwards."""
    name = str(running.get("pod", "demo-aggregator")["spec"]["nodeName"])
    yield name
    kubectl("uncordon", name)


def until_back() -> None:
    """Wait for the API server. Its not-ready message also contains "ok"."""
    eventually(lambda: kubectl("get", "--raw", "/readyz", check=False).strip() == "ok", "the API server is back")


def delete(namespace: Namespace, pod: str) -> None:
    """Delete a pod. The API server may still fail requests."""
    said = ""

    def deleted() -> bool:
        nonlocal said
        said = namespace.kubectl("delete", "pod", pod, "--wait=false", check=False)
        return f'pod "{pod}" deleted' in said or f'pods "{pod}" not found' in said

    eventually(deleted, f"{pod} is deleted", every=1.0, show=lambda: said)


def uids(namespace: Namespace) -> dict[str, str]:
    return {item["metadata"]["name"]: item["metadata"]["uid"] for item in namespace.items("pod")}


def test_a_drained_node_costs_no_restarts(running: Namespace, node: str) -> None:
    kubectl("drain", node, "--pod-selector=isthmus.dev/job=demo", "--ignore-daemonsets", "--delete-emptydir-data",
            "--force", "--timeout=240s")  # fmt: skip
    eventually(lambda: "nschedulable" in running.pool().get("reason", ""), "the pool says why it waits")
    eventually(lambda: running.condition("AggregatorReady").startswith("False/"), "its aggregator is away")
    kubectl("uncordon", node)
    wanted = {"demo-aggregator", "demo-cloud-0-1", "demo-cloud-1-1"}
    eventually(lambda: running.running() == wanted, "everything runs again", 180)
    assert not running.events("ClientFailed")


def test_a_client_that_is_killed_for_its_memory_counts_as_failed(running: Namespace) -> None:
    running.touch("demo-cloud-0-0", "/tmp/hoard")  # noqa: S108 - in the pod
    eventually(lambda: "OOMKilled" in running.pool().get("reason", ""), "the pool names the cause")
    (event,) = eventually(lambda: running.events("ClientFailed"), "it is counted")
    assert "OOMKilled" in event
    assert "3 restarts left" in event
    eventually(lambda: "demo-cloud-0-1" in running.running(), "it is started again")


def test_a_client_that_fills_the_disk_is_evicted_and_counts_as_failed(running: Namespace) -> None:
    running.touch("demo-cloud-1-0", "/tmp/fill")  # noqa: S108
    eventually(lambda: "Evicted" in running.pool().get("reason", ""), "the kubelet evicts it", 240)
    (event,) = eventually(lambda: running.events("ClientFailed"), "its own limit: it is counted")
    assert "exceed" in event
    eventually(lambda: "demo-cloud-1-1" in running.running(), "it is started again")


def test_an_api_server_that_restarts_costs_nothing(running: Namespace, operator: Operator, lab: Lab) -> None:
    before, site = uids(running), running.name
    assert operator.process is not None
    known = f'isthmus_operator_site_reachable{{site="{site}"}}'
    with FakeBridge() as bridge:
        running.apply(bridge.secret())
        kubectl("apply", "-f", "-", stdin=bridge.site(site))
        eventually(lambda: f"{known} 1.0" in operator.metrics(), "the operator knows the site")
    lab.kill_daemon("kube-apiserver")
    try:
        eventually(lambda: 'code="none"' in operator.metrics(), "the operator notices")
        operator.process.send_signal(signal.SIGSTOP)
    finally:
        lab.restart_api_server()
    try:
        until_back()
        assert uids(running) == before
        # The new API server reports no events from before its start, so no watch sees this deletion.
        delete(running, "demo-cloud-0-0")
        kubectl("delete", "hpcsite", site)
        eventually(lambda: "demo-cloud-0-0" not in uids(running), "it is gone")
    finally:
        operator.process.send_signal(signal.SIGCONT)
    eventually(lambda: "demo-cloud-0-1" in running.running(), "the operator has seen it all the same", 240)
    eventually(lambda: known not in operator.metrics(), "it has forgotten the site", 420)
    assert operator.process.poll() is None
    eventually(operator.ready, "it is well")
    assert not running.events("ClientFailed")


def test_an_etcd_that_pauses_costs_nothing(running: Namespace, operator: Operator, lab: Lab) -> None:
    before = uids(running)
    (pid,) = [pid for name, pid, _ in lab.daemons() if name == "etcd" and pid]
    os.kill(pid, signal.SIGSTOP)
    try:
        said = kubectl("patch", "fj", "demo", "-n", running.name, "--type=merge", "-p", '{"spec":{"backoffLimit":4}}',
                       "--request-timeout=8s", check=False)  # fmt: skip
        assert "patched" not in said
    finally:
        os.kill(pid, signal.SIGCONT)
    until_back()
    delete(running, "demo-cloud-1-0")
    eventually(lambda: "demo-cloud-1-1" in running.running(), "the operator goes on", 240)
    assert uids(running)["demo-aggregator"] == before["demo-aggregator"]
    assert operator.process is not None
    assert operator.process.poll() is None
