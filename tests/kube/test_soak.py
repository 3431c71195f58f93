"""Many short jobs one after the other: the operator forgets each."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from .cluster import Namespace, Operator, eventually, manifest

# Stand-in for an aggregator that has completed the training at once.
COMPLETE = """\
echo '{"phase":"COMPLETE","completedRounds":3,"totalRounds":3}' >/dev/termination-log
"""
CONCURRENCY = 4  # parallel requests to the API server: each takes a thread, which is kept
OF_JOBS = ("jobs", "memories", "keys", "pods", "channels")
ROUNDS = 4
REST_SECONDS = 5  # tasks for events of an object end half a second after the last event


def cached(operator: Operator) -> dict[str, int]:
    """Return the number of the operator's cached objects by kind."""
    found = re.findall(r'^isthmus_operator_kept\{kind="(\w+)"\} (\S+)', operator.metrics(), re.MULTILINE)
    return {kind: int(float(count)) for kind, count in found}


def usage(operator: Operator) -> tuple[int, int]:
    """Return the number of threads and open files of the operator's process."""
    assert operator.process is not None
    proc = Path(f"/proc/{operator.process.pid}")
    return len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))


def short_jobs(number: int) -> list[dict[str, Any]]:
    """Return three jobs: one completes, one will be suspended, and one is deleted while it starts."""
    jobs = [manifest(f"{kind}-{number}", cloud=1) for kind in ("complete", "suspended", "starting")]
    jobs[0]["spec"]["aggregator"]["template"]["spec"]["containers"][0]["command"] = ["sh", "-c", COMPLETE]
    for job in jobs:
        job["spec"]["aggregator"]["checkpoint"] = {"storage": "EmptyDir"}
    return jobs


def one_round(namespace: Namespace, operator: Operator, number: int) -> None:
    """Run a batch of jobs, and wait until the cluster and the operator's memory hold no trace of them."""
    namespace.apply(*short_jobs(number))
    complete, suspended = f"complete-{number}", f"suspended-{number}"
    eventually(lambda: f"{suspended}-cloud-0-0" in namespace.names("pod"), "its pods are made")
    namespace.kubectl("patch", "fj", suspended, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    namespace.until("Complete", "True/RoundsCompleted", complete, 180)
    namespace.until("Suspended", "True/SuspendedByUser", suspended)
    known = cached(operator)
    assert known["jobs"] == known["memories"] == 3
    namespace.kubectl("delete", "fj", "--all", "--timeout=180s")
    namespace.until_bare()
    nothing = dict.fromkeys(OF_JOBS, 0)
    eventually(
        lambda: nothing.items() <= cached(operator).items(), "it forgets the jobs", show=lambda: cached(operator)
    )


def settled(operator: Operator) -> int:
    """Return the number of the operator's idle asyncio tasks, once it is stable."""
    last, since = cached(operator)["tasks"], time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if (now := cached(operator)["tasks"]) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > REST_SECONDS

    eventually(still, f"its tasks stay the same for {REST_SECONDS} s", show=lambda: cached(operator))
    return last


def test_nothing_is_kept_of_short_jobs(namespace: Namespace, operator: Operator) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("reads threads and files from /proc")
    operator.stop()
    operator.start("--api-concurrency", str(CONCURRENCY))
    one_round(namespace, operator, 0)
    tasks = settled(operator)
    threads, files = usage(operator)
    for number in range(1, ROUNDS):
        one_round(namespace, operator, number)
    # Tasks for events of objects end a moment after the last event.
    eventually(lambda: cached(operator)["tasks"] <= tasks + 2, "its tasks end", show=lambda: cached(operator))
    # Threads and connections grow to the peak concurrency. There were more jobs than that, so a leak per job would
    # exceed this limit. Watches and name look-ups add a few connections.
    eventually(
        lambda: usage(operator)[0] <= threads + CONCURRENCY and usage(operator)[1] <= files + CONCURRENCY + 4,
        f"about {threads} threads and {files} files as after the first round",
        show=lambda: usage(operator),
    )
