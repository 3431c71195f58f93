"""The chart's whole life under a running job: from the version before, over each kind of upgrade, to the end."""

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
# The chart before it had monitoring, with roles that are enough for today's images: there are no others here.
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
# Trains until most of the clients find a file, so that the job lasts as long as the upgrades take.
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
    """A cluster from which Isthmus was uninstalled; afterwards it is there again, for the other tests."""
    if cluster.site is not None:
        request.getfixturevalue("platform")  # with a site that was reached
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
                goes_on(bare, job, train)
            run(helm, "upgrade", *RELEASE[:1], CHART, *RELEASE[1:], *options)
            assert '"status":"deployed"' in run(helm, "status", "isthmus", "--namespace", SYSTEM, "-o", "json")
            assert len(get("configmaps", SYSTEM, "-l", "grafana_dashboard=1")) == 3
            assert len(get("networkpolicies", SYSTEM)) == 1
            say(f"{version}, {kind}: round {goes_on(bare, job, train)}")
        if helm == "helm":
            finish(bare, job)
        # The definitions stay, and with them every job; nothing else does. Training needs no operator.
        run(helm, "uninstall", "isthmus", "--namespace", SYSTEM, "--wait")
        eventually("nothing of the chart is left", lambda: not left())
    assert bare.status(job)["phase"] == "Complete"
    # The operator that would take a finalizer away comes back with the fixture; what the job owns goes with it.
    run("kubectl", "-n", bare.namespace, "patch", "fj", job, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def start(platform: Platform, job: str) -> None:
    """A job over pods and, where there is a site, a Slurm task."""
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
    """All that stays as it is while the job trains undisturbed."""
    pods = platform.pods(job, "aggregator") + platform.pods(job, "client")
    return {
        "pods": {pod["metadata"]["name"]: (pod["metadata"]["uid"], _restarts(pod)) for pod in pods},
        "tasks": platform.site.squeue() if platform.site else [],
        "submitted": [pool.get("jobs") for pool in platform.status(job)["pools"]],
    }


def goes_on(platform: Platform, job: str, before: dict[str, Any]) -> int:
    """Checks that the operator reports new rounds of the same processes, each committed once; the newest round."""
    platform.wait_for_round(job, platform.completed(job) + 2)
    assert trace(platform, job) == before
    log = run("kubectl", "-n", platform.namespace, "logs", f"{job}-aggregator")
    committed = [int(number) for number in re.findall(r"round (\d+) committed", log)]
    assert committed == list(range(1, len(committed) + 1))
    return len(committed)


def finish(platform: Platform, job: str) -> None:
    """Ends the job from within: most clients measure what it aims at."""
    for pod in platform.pods(job, "client"):
        run("kubectl", "-n", platform.namespace, "exec", pod["metadata"]["name"], "--", "touch", "/tmp/stop")  # noqa: S108
    platform.wait_for_completion(job)
    assert platform.condition(job, "Complete")["reason"] == "TargetReached"


def left() -> list[str]:
    """What is left of the chart: the garbage collector takes its time."""
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
