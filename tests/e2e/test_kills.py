"""The job completes after any component is killed."""

import re
from collections.abc import Callable

import pytest

from .conftest import SYSTEM, Platform, eventually, run, say

pytestmark = pytest.mark.timeout(1800)


def kill_client_pod(platform: Platform, job: str) -> None:
    pod = platform.pods(job, "client")[0]["metadata"]["name"]
    say(run("kubectl", "delete", "pod", pod, "--grace-period=0", "--force", check=False))


def kill_slurm_task(platform: Platform, job: str) -> None:
    task = next(line.split()[0] for line in platform.slurm.squeue() if "RUNNING" in line)
    say(run("scancel", "--signal=KILL", "--full", task, check=False) + f"killed {task}")


def kill_aggregator(platform: Platform, job: str) -> None:
    say(run("kubectl", "delete", "pod", f"{job}-aggregator", "--grace-period=0", "--force", check=False))


def kill_bridge(platform: Platform, job: str) -> None:
    platform.slurm.kill_bridge()
    before = platform.completed(job)
    platform.wait_for_round(job, before + 1)  # training does not need the bridge
    platform.slurm.start_bridge()


def kill_api_server(platform: Platform, job: str) -> None:
    """Kill the API server in the middle of a round: training continues without it, and no client restarts."""
    lab = platform.slurm.lab
    before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in platform.pods(job, "client")}
    rounds = platform.completed(job)
    lab.kill_daemon("kube-apiserver")
    lab.restart_api_server()
    platform.wait_for_round(job, rounds + 1)
    after = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in platform.pods(job, "client")}
    assert after == before
    # According to the aggregator's log, no round was started twice, and every client's update counted in each.
    log = run("kubectl", "logs", f"{job}-aggregator")
    say("\n".join(line for line in log.splitlines() if "committed" in line))
    assert "resuming after round" not in log
    # The job may have started with three ready clients, but none was lost through the kill.
    counted = {int(n): int(k) for n, k in re.findall(r"round (\d+) committed: (\d+) updates", log)}
    assert min(k for n, k in counted.items() if n > rounds) >= counted[rounds]


def kill_operator(platform: Platform, job: str) -> None:
    say(run("kubectl", "-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/name=isthmus", "--grace-period=0",
            "--force", check=False))  # fmt: skip


# The API server is away for several rounds, so the job needs enough rounds after that.
ROUNDS = {kill_api_server: 70}


@pytest.mark.parametrize("kill", [kill_client_pod, kill_slurm_task, kill_aggregator, kill_bridge, kill_operator,
                                  kill_api_server])  # fmt: skip
def test_the_job_completes_after_a_kill(platform: Platform, job: str, kill: Callable[[Platform, str], None]) -> None:
    # Rounds long enough that the kill happens during one; a killed Slurm task leaves three clients.
    rounds = ROUNDS.get(kill, 24)
    manifest = platform.manifest(
        job, rounds=rounds, task__config__localEpochs="25", selection__minClients=3, stragglers__minUpdates=2
    )
    platform.apply(manifest)
    platform.wait_for_round(job, 3)
    assert platform.completed(job) < rounds
    kill(platform, job)
    platform.wait_for_completion(job)
    assert platform.completed(job) == rounds
    # At most one array was submitted per attempt of the pool.
    status = platform.status(job)
    pool = next(pool for pool in status["pools"] if pool["name"] == "hpc")
    assert len(pool["jobs"]) <= pool.get("attempt", 0) + 1
    platform.delete(job)
    eventually("Slurm has nothing of it", lambda: not platform.slurm.squeue())
