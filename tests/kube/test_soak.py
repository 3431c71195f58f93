"""Many short jobs one after the other: the operator forgets each."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from .cluster import Namespace, Operator, eventually, manifest

# As the stand-in, but it has completed the training at once.
COMPLETE = """\
echo '{"phase":"COMPLETE","completedRounds":3,"totalRounds":3}' >/dev/termination-log
"""
CONCURRENCY = 4  # requests to the API server at the same time: each takes a thread, which is kept
OF_JOBS = ("jobs", "memories", "keys", "pods", "channels")
ROUNDS = 4
REST_SECONDS = 5  # tasks for the news of an object end half a second after the last news


def kept(operator: Operator) -> dict[str, int]:
    """What the operator keeps in memory, by kind."""
    found = re.findall(r'^isthmus_operator_kept\{kind="(\w+)"\} (\S+)', operator.metrics(), re.MULTILINE)
    return {kind: int(float(count)) for kind, count in found}


def usage(operator: Operator) -> tuple[int, int]:
    """Threads and open files of the operator's process."""
    assert operator.process is not None
    proc = Path(f"/proc/{operator.process.pid}")
    return len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))


def short_jobs(number: int) -> list[dict[str, Any]]:
    """One that completes, one that will be suspended, and one that is deleted while it starts."""
    jobs = [manifest(f"{kind}-{number}", cloud=1) for kind in ("complete", "suspended", "starting")]
    jobs[0]["spec"]["aggregator"]["template"]["spec"]["containers"][0]["command"] = ["sh", "-c", COMPLETE]
    for job in jobs:
        job["spec"]["aggregator"]["checkpoint"] = {"storage": "EmptyDir"}
    return jobs


def one_round(namespace: Namespace, operator: Operator, number: int) -> None:
    """A round of jobs, until nothing in the cluster nor in the operator's memory is left of them."""
    namespace.apply(*short_jobs(number))
    complete, suspended = f"complete-{number}", f"suspended-{number}"
    eventually(lambda: f"{suspended}-cloud-0-0" in namespace.names("pod"), "its pods are made")
    namespace.kubectl("patch", "fj", suspended, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    namespace.until("Complete", "True/RoundsCompleted", complete, 180)
    namespace.until("Suspended", "True/SuspendedByUser", suspended)
    known = kept(operator)
    assert known["jobs"] == known["memories"] == 3
    namespace.kubectl("delete", "fj", "--all", "--timeout=180s")
    namespace.until_bare()
    nothing = dict.fromkeys(OF_JOBS, 0)
    eventually(lambda: nothing.items() <= kept(operator).items(), "it forgets the jobs", show=lambda: kept(operator))


def settled(operator: Operator) -> int:
    """How many tasks the operator has at rest: so many for a while, whatever was still beginning or ending."""
    last, since = kept(operator)["tasks"], time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if (now := kept(operator)["tasks"]) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > REST_SECONDS

    eventually(still, f"its tasks stay the same for {REST_SECONDS} s", show=lambda: kept(operator))
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
    # Tasks for the news of objects end a moment after the last news.
    eventually(lambda: kept(operator)["tasks"] <= tasks + 2, "its tasks end", show=lambda: kept(operator))
    # Threads and connections for requests are made as they are first needed at the same time: with fewer of them than
    # there were jobs, what is kept of each job would show. Watches and look-ups of names add a few connections.
    eventually(
        lambda: usage(operator)[0] <= threads + CONCURRENCY and usage(operator)[1] <= files + CONCURRENCY + 4,
        f"about {threads} threads and {files} files as after the first round",
        show=lambda: usage(operator),
    )
