"""The chart's whole life with either Helm: from the version before, over an upgrade under a running job, to the end."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CLUSTER, REPOSITORY, ROOT, SYSTEM, Platform, eventually, get, install, run, say

pytestmark = pytest.mark.timeout(1800)

# The chart before it had monitoring, with roles that are enough for today's images: there are no others here.
BEFORE = Path(__file__).parent / "previous" / "isthmus-0.1.0.tgz"
VALUES = (
    "--namespace", SYSTEM, "--set", f"operator.cluster={CLUSTER},operator.resyncSeconds=1",
    "--set", f"image.repository={REPOSITORY}/isthmus-operator", "--set", "image.pullPolicy=IfNotPresent",
    "--wait", "--timeout", "600s",
)  # fmt: skip
ROUNDS = 90


@pytest.fixture
def bare(cluster: Platform) -> Iterator[Platform]:
    """A cluster from which Isthmus was uninstalled; afterwards it is there again, for the other tests."""
    run("helm", "uninstall", "isthmus", "--namespace", SYSTEM, "--wait")
    try:
        yield cluster
    finally:
        run("helm", "uninstall", "isthmus", "--namespace", SYSTEM, "--wait", check=False)
        install("Never" if cluster.site else "IfNotPresent")


@pytest.mark.parametrize("helm", ["helm3", "helm"])
def test_from_the_version_before_to_the_end(bare: Platform, job: str, helm: str) -> None:
    version = run(helm, "version", "--short").strip()
    run(helm, "install", "isthmus", BEFORE, *VALUES, "--create-namespace")
    pools = [{"name": "cloud", "replicas": 2, "cloud": {}}]
    # An upgrade may take a minute, and must not outlast them.
    changes = {"rounds": ROUNDS, "pools": pools, "selection": {"minClients": 2}, "stragglers": {"minUpdates": 2}}
    bare.apply(bare.manifest(job, task__config__localEpochs="30", **changes))
    bare.wait_for_round(job, 2)
    before = uids(bare, job)

    values = (*VALUES, "--set", "monitoring.enabled=true,networkPolicy.enabled=true")
    run(helm, "upgrade", "isthmus", ROOT / "charts" / "isthmus", *values)
    upgraded_at = bare.completed(job)
    say(f"{version}: upgraded after round {upgraded_at} of {ROUNDS}")
    assert upgraded_at < ROUNDS
    assert len(get("configmaps", SYSTEM, "-l", "grafana_dashboard=1")) == 3
    assert len(get("networkpolicies", SYSTEM)) == 1
    assert '"status":"deployed"' in run(helm, "status", "isthmus", "--namespace", SYSTEM, "-o", "json")
    bare.wait_for_completion(job)
    # Undisturbed: the same pods from the first round to the last, and none restarted.
    assert uids(bare, job) == before
    assert before and not [pod for pod in bare.pods(job, "client") + bare.pods(job, "aggregator") if _restarts(pod)]

    run(helm, "rollback", "isthmus", "1", "--namespace", SYSTEM, "--wait")
    assert not get("configmaps", SYSTEM, "-l", "grafana_dashboard=1")
    run(helm, "uninstall", "isthmus", "--namespace", SYSTEM, "--wait")
    # The definitions stay, and with them every job; nothing else does.
    assert bare.status(job)["phase"] == "Complete"

    def left() -> list[str]:
        """What the garbage collector has yet to take, too."""
        items = json.loads(run("kubectl", "get", "all,cm,sa,role,rolebinding,netpol", "-n", SYSTEM, "-o", "json",
                               "-l", "app.kubernetes.io/part-of=isthmus"))["items"]  # fmt: skip
        cluster_wide = run("kubectl", "get", "clusterrole,clusterrolebinding", "-o", "name",
                           "-l", "app.kubernetes.io/part-of=isthmus")  # fmt: skip
        return [item["metadata"]["name"] for item in items if item["kind"] != "Pod"] + cluster_wide.split()

    eventually("nothing of the chart is left", lambda: not left())
    # Nobody is there to take the job's finalizer away; what it owns goes with it.
    run("kubectl", "-n", bare.namespace, "patch", "fj", job, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def test_a_wrong_value_is_refused_before_anything_happens(cluster: Platform) -> None:
    for helm in ("helm3", "helm"):
        command = [helm, "upgrade", "isthmus", ROOT / "charts" / "isthmus", "--namespace", SYSTEM]
        done = subprocess.run([*command, "--set", "monitoring.on=true"], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "schema" in done.stderr


def uids(platform: Platform, job: str) -> set[str]:
    """Of the job's pods."""
    return {pod["metadata"]["uid"] for role in ("aggregator", "client") for pod in platform.pods(job, role)}


def _restarts(pod: dict[str, dict[str, list[dict[str, int]]]]) -> int:
    return sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))
