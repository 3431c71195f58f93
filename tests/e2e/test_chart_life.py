"""Life cycle of the chart under a running job: the previous version, each kind of upgrade, and removal."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import CLUSTER, REPOSITORY, ROOT, SITE, SYSTEM, Platform, eventually, get, install, run, say

pytestmark = pytest.mark.timeout(1800)

CHART = ROOT / "charts" / "isthmus"
# The last chart without monitoring. Its roles suffice for today's images; there are no older images.
BEFORE = Path(__file__).parent / "previous" / "isthmus-0.1.0.tgz"
RELEASE = ("isthmus", "--namespace", SYSTEM, "--wait", "--timeout", "600s")
VALUES = (
    "--set", f"operator.cluster={CLUSTER},operator.resyncSeconds=1",
    "--set", f"image.repository={REPOSITORY}/isthmus-operator", "--set", "image.pullPolicy=IfNotPresent",
)  # fmt: skip
NEW = ("--set", "monitoring.enabled=true,networkPolicy.enabled=true")
UPGRADES = {
    "--reuse-values": ("--reuse-values", *NEW),
    "--reset-then-reuse-values": ("--reset-then-reuse-values", *NEW),
    "plain values": (*VALUES, *NEW),
}
PODS = 3
# Trains until most clients find a file, so that the job lasts as long as the upgrades take.
SCRIPT = """\
import time
from pathlib import Path

import torch

import isthmus


def evaluate():
    return {"stop": float(Path("/tmp/stop").exists())}


model = torch.nn.Linear(4, 1)
for rnd in isthmus.rounds(model, evaluate=evaluate):
    time.sleep(0.5)
    rnd.submit(num_examples=1, loss=1.0)
"""


@pytest.fixture
def bare(cluster: Platform, request: pytest.FixtureRequest) -> Iterator[Platform]:
    """Uninstall Isthmus from the cluster; install it again afterwards, for the other tests."""
    if cluster.site is not None:
        request.getfixturevalue("platform")  # with a connected site
    run("helm", "uninstall", "isthmus", "--namespace", SYSTEM, "--wait")
    try:
        yield cluster
    finally:
        run("helm", "uninstall", "isthmus", "--namespace", SYSTEM, "--wait", check=False)
        install("Never" if cluster.site else "IfNotPresent")


def test_a_job_trains_through_every_upgrade(bare: Platform, job: str) -> None:
    train: dict[str, Any] = {}
    for helm in ("helm3", "helm"):
        version = run(helm, "version", "--short").strip()
        run(helm, "install", *RELEASE[:1], BEFORE, *RELEASE[1:], *VALUES, "--create-namespace")
        if not train:
            start(bare, job)
            bare.wait_for_round(job, 2)
            train = trace(bare, job)
        for number, (kind, options) in enumerate(UPGRADES.items()):
            if number:
                run(helm, "rollback", "isthmus", "1", "--namespace", SYSTEM, "--wait")
                assert not get("configmaps", SYSTEM, "-l", "grafana_dashboard=1")
                check_progress(bare, job, train)
            run(helm, "upgrade", *RELEASE[:1], CHART, *RELEASE[1:], *options)
            assert '"status":"deployed"' in run(helm, "status", "isthmus", "--namespace", SYSTEM, "-o", "json")
            assert len(get("configmaps", SYSTEM, "-l", "grafana_dashboard=1")) == 3
            assert len(get("networkpolicies", SYSTEM)) == 1
            say(f"{version}, {kind}: round {check_progress(bare, job, train)}")
        if helm == "helm":
            finish(bare, job)
        # The CRDs remain, and with them every job; everything else is removed. Training needs no operator.
        run(helm, "uninstall", "isthmus", "--namespace", SYSTEM, "--wait")
        eventually("nothing of the chart is left", lambda: not remaining())
    assert bare.status(job)["phase"] == "Complete"
    # No operator is running that would remove the finalizer; the job's objects are deleted with it.
    run("kubectl", "-n", bare.namespace, "patch", "fj", job, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def start(platform: Platform, job: str) -> None:
    """Start a job with pods and, if there is a site, a Slurm task."""
    run(
        "kubectl", "-n", platform.namespace, "create", "configmap", f"{job}-script", f"--from-literal=train.py={SCRIPT}"
    )
    pools: list[dict[str, Any]] = [{"name": "cloud", "replicas": PODS, "cloud": {}}]
    if platform.site is not None:
        place = {"siteRef": {"name": SITE}, "partition": "main", "environment": "isthmus", "timeLimitSeconds": 1800}
        pools.append({"name": "hpc", "replicas": 1, "hpc": place | {"resources": {"cpusPerTask": 1, "memoryMiB": 512}}})
    count = sum(pool["replicas"] for pool in pools)
    changes: dict[str, Any] = {"selection": {"minClients": count}, "stragglers": {"minUpdates": count}, "pools": pools}
    platform.apply(
        platform.manifest(
            job,
            rounds=10_000,
            task__command=["python", "train.py"],
            task__code={"configMapRef": {"name": f"{job}-script"}},
            objective={"metric": "stop", "target": "0.5"},
            **changes,
        )
    )


def trace(platform: Platform, job: str) -> dict[str, Any]:
    """Return everything that stays the same while the job trains undisturbed."""
    pods = platform.pods(job, "aggregator") + platform.pods(job, "client")
    return {
        "pods": {pod["metadata"]["name"]: (pod["metadata"]["uid"], _restarts(pod)) for pod in pods},
        "tasks": platform.site.squeue() if platform.site else [],
        "submitted": [pool.get("jobs") for pool in platform.status(job)["pools"]],
    }


def check_progress(platform: Platform, job: str, before: dict[str, Any]) -> int:
    """Check that the same processes commit new rounds, each once; return the newest round."""
    platform.wait_for_round(job, platform.completed(job) + 2)
    assert trace(platform, job) == before
    log = run("kubectl", "-n", platform.namespace, "logs", f"{job}-aggregator")
    committed = [int(number) for number in re.findall(r"round (\d+) committed", log)]
    assert committed == list(range(1, len(committed) + 1))
    return len(committed)


def finish(platform: Platform, job: str) -> None:
    """Make most clients reach the target metric, which ends the job."""
    for pod in platform.pods(job, "client"):
        run("kubectl", "-n", platform.namespace, "exec", pod["metadata"]["name"], "--", "touch", "/tmp/stop")  # noqa: S108
    platform.wait_for_completion(job)
    assert platform.condition(job, "Complete")["reason"] == "TargetReached"


def remaining() -> list[str]:
    """Return the chart's remaining objects. The garbage collector may still be deleting some."""
    items = json.loads(run("kubectl", "get", "all,cm,sa,role,rolebinding,netpol", "-n", SYSTEM, "-o", "json",
                           "-l", "app.kubernetes.io/part-of=isthmus"))["items"]  # fmt: skip
    cluster_wide = run("kubectl", "get", "clusterrole,clusterrolebinding", "-o", "name",
                       "-l", "app.kubernetes.io/part-of=isthmus")  # fmt: skip
    return [item["metadata"]["name"] for item in items if item["kind"] != "Pod"] + cluster_wide.split()


def test_a_wrong_value_is_refused_before_anything_happens(cluster: Platform) -> None:
    for helm in ("helm3", "helm"):
        command = [helm, "upgrade", "isthmus", ROOT / "charts" / "isthmus", "--namespace", SYSTEM]
        done = subprocess.run([*command, "--set", "monitoring.on=true"], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "schema" in done.stderr


def _restarts(pod: dict[str, dict[str, list[dict[str, int]]]]) -> int:
    return sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))
