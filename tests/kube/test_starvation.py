"""Jobs at a dead bridge and silent aggregators in real pods: a job elsewhere is served without delay.

``ISTHMUS_DEAD_JOBS`` and ``ISTHMUS_SILENT_AGGREGATORS`` set their numbers; each silent aggregator is a pod.
"""

import os
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, kubectl, manifest, remove_site

JOBS = int(os.environ.get("ISTHMUS_DEAD_JOBS", "30"))
SILENT = int(os.environ.get("ISTHMUS_SILENT_AGGREGATORS", "8"))
SAMPLES = 2
# 2 s on a quiet machine. If workers waited for unresponsive peers, it would take a minute or more.
ACCEPTED_SECONDS = 10.0
RUNNING_SECONDS = 40.0

# An aggregator that accepts connections, reads, and never answers.
SILENCE = """\
trap 'exit 143' TERM
nc -ll -p 7443 -e sh -c 'cat >/dev/null' &
wait
"""


class DeadBridge(FakeBridge):
    """Server that accepts connections and calls without answering."""

    def __init__(self) -> None:
        self.calls = 0
        self._end = threading.Event()
        super().__init__()

    def down(self) -> None:
        self._end.set()
        super().down()

    def _never(self, _: Any, context: grpc.ServicerContext) -> Any:
        self.calls += 1
        self._end.wait()
        context.abort(grpc.StatusCode.UNAVAILABLE, "the bridge stops")

    DescribeSite = EnsurePool = GetPool = CancelPool = RenewCredentials = TailLog = _never


@pytest.fixture
def dead(namespace: Namespace) -> Iterator[DeadBridge]:
    """Yield a site, named like the namespace, whose bridge never answers."""
    with DeadBridge() as bridge:
        namespace.apply(bridge.secret())
        kubectl("apply", "-f", "-", stdin=bridge.site(namespace.name))
        yield bridge
    remove_site(namespace.name)


def at_dead_site(name: str, site: str, **aggregator: Any) -> dict[str, Any]:
    """Return a job whose only clients are at a site, and which has no volume."""
    job = manifest(name, cloud=0, pools=[FakeBridge.pool(site, 1)])
    job["spec"]["aggregator"]["checkpoint"] = {"storage": "EmptyDir"}
    job["spec"]["aggregator"]["template"]["spec"] |= aggregator
    return job


def served_after(namespace: Namespace, name: str) -> tuple[float, float]:
    """Return the seconds from apply until a job is accepted, and until its aggregator runs."""
    job = manifest(name, cloud=1)
    job["spec"]["aggregator"]["checkpoint"] = {"storage": "EmptyDir"}
    namespace.apply(job)
    began = time.monotonic()
    eventually(lambda: namespace.condition("Accepted", name) == "True/Valid", f"{name} is accepted", 600, 0.02)
    accepted = time.monotonic() - began
    namespace.until("AggregatorReady", "True/AggregatorRunning", name, 600)
    return round(accepted, 2), round(time.monotonic() - began, 2)


def served(namespace: Namespace, what: str) -> tuple[float, float]:
    """Return the medians over several jobs, run one after the other."""
    samples = [served_after(namespace, f"{what}-{number}") for number in range(SAMPLES)]
    print(f"{what}: accepted after, running after (s): {samples}")
    return statistics.median(a for a, _ in samples), statistics.median(b for _, b in samples)


def count_with(namespace: Namespace, prefix: str, condition: str) -> int:
    """Return the number of jobs with this name prefix that have a condition."""
    found = namespace.items("fj", "")
    return sum(
        any(item["type"] == condition for item in (job.get("status") or {}).get("conditions", ()))
        for job in found
        if job["metadata"]["name"].startswith(prefix)
    )


def test_unresponsive_peers_delay_no_other_namespace(
    namespace: Namespace, second: Namespace, both: Operator, dead: DeadBridge
) -> None:
    quiet = served(second, "quiet")
    # Each costs a pod that is not scheduled.
    nowhere = {"nodeSelector": {"isthmus.dev/nowhere": "true"}}
    namespace.apply(*(at_dead_site(f"dead-{number}", namespace.name, **nowhere) for number in range(JOBS)))
    at_once = served(second, "at-once")
    eventually(lambda: count_with(namespace, "dead", "Accepted") >= JOBS, "all jobs at the dead site are accepted", 300)
    eventually(lambda: dead.calls > 2, "the bridge is called")
    at_dead = served(second, "dead-bridge")
    template = [{"name": "aggregator", "command": ["sh", "-c", SILENCE]}]
    silent = [at_dead_site(f"silent-{number}", namespace.name, containers=template) for number in range(SILENT)]
    namespace.apply(*silent)
    eventually(lambda: len(namespace.running()) >= SILENT, "the silent aggregators run", 600)
    eventually(lambda: count_with(namespace, "silent", "AggregatorReady") >= SILENT, "the operator has seen them", 300)
    with_both = served(second, "silent")
    for accepted, running in (at_once, at_dead, with_both):
        assert accepted < ACCEPTED_SECONDS and running < RUNNING_SECONDS, (quiet, at_once, at_dead, with_both)
