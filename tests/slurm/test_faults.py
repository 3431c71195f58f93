"""Events at a real site: limits, preemption, lost nodes, held jobs, a controller that stops."""

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import Site, ensure, get, over, running, slurm, spec, tail, until, wait_for_output

if TYPE_CHECKING:
    from lab import Lab

# Prints its attempt at every start, submits on the warning, and continues until the limit.
PATIENT = ["sh", "-c", "trap 'echo partial' TERM; echo attempt $ISTHMUS_ATTEMPT; while :; do sleep 0.2; done"]


def phase(pool: pb.Pool) -> str:
    return pb.Pool.Phase.Name(pool.phase)


def alone(**changes: object) -> pb.PoolSpec:
    """Return a request for one task that fills the node n2."""
    return spec(replicas=1, total_clients=5, partition="debug", cpus_per_task=4, command=PATIENT, **changes)


@pytest.fixture
def n2(lab: "Lab") -> Iterator[str]:
    """Yield the only node of the partition debug, and wait until it is up at the end."""
    yield "n2"
    up = ("idle", "mixed", "allocated")
    until(lambda: slurm("sinfo", "-h", "-n", "n2", "-N", "-o", "%T").split()[0] in up, "n2 is back")


def test_the_time_limit(site: Site, operator: rpc.BridgeStub, lab: "Lab") -> None:
    key = site.key()
    asked = time.time()
    pool = ensure(operator, key, alone(time_limit_seconds=120))
    running(operator, key, 1)
    # Known from the start, so that the next attempt can start before this one ends.
    seen = get(operator, key)
    # Two minutes after the start, which was between the request and this poll; Slurm counts whole seconds.
    assert asked + 118 < seen.ends_at < time.time() + 122
    wait_for_output(operator, key, 0, "attempt 1000")
    slurm("scontrol", "update", f"jobid={pool.slurm_job_id}", "EndTime=now+2")
    pool = over(operator, key)
    assert phase(pool) == "FAILED"
    assert [(task.state, task.reason) for task in pool.tasks] == [("TIMEOUT", "TimeLimit")]
    assert "TIMEOUT" in pool.message
    assert pool.time_limit_reached
    assert "partial" in tail(operator, key, 0), "the script was not warned"


def test_preemption_puts_a_task_back_into_the_queue(site: Site, operator: rpc.BridgeStub, n2: str) -> None:
    key = site.key()
    pool = ensure(operator, key, alone())
    running(operator, key, 1)
    wait_for_output(operator, key, 0, "attempt 1000")
    stranger = slurm("sbatch", "--parsable", "-p", "urgent", "-w", n2, "-n", "4", "--mem=100M", "-o", "/dev/null",
                     "--wrap", "sleep 600").strip()  # fmt: skip
    try:
        waiting = until(lambda: (p := get(operator, key)).queued == 1 and p, "the task waits again")
        assert phase(waiting) == "PENDING" and waiting.failed == 0
        assert waiting.slurm_job_id == pool.slurm_job_id
        until(lambda: slurm("squeue", "-h", "-j", stranger, "-o", "%T").strip() == "RUNNING", "the other job runs")
    finally:
        slurm("scancel", stranger)
    _second_attempt(site, operator, key)


def test_a_node_that_dies_and_comes_back(site: Site, operator: rpc.BridgeStub, lab: "Lab", n2: str) -> None:
    key = site.key()
    ensure(operator, key, alone())
    running(operator, key, 1)
    wait_for_output(operator, key, 0, "attempt 1000")
    lab.stop_slurm_daemon(f"slurmd-{n2}", kill=True)
    try:
        # The controller would notice it only after SlurmdTimeout, 20 seconds.
        slurm("scontrol", "update", f"nodename={n2}", "state=down", "reason=test")
        waiting = until(lambda: (p := get(operator, key)).queued == 1 and p.reason and p, "the task waits again")
    finally:
        lab.start_slurm_daemon(f"slurmd-{n2}")
    assert phase(waiting) == "PENDING" and waiting.failed == 0
    _second_attempt(site, operator, key)


def _second_attempt(site: Site, operator: rpc.BridgeStub, key: str) -> None:
    running(operator, key, 1)
    wait_for_output(operator, key, 0, "attempt 1001")
    assert re.findall(r"attempt \d+", tail(operator, key, 0)) == ["attempt 1000", "attempt 1001"]
    assert len(site.arrays(key)) == 1


def test_held_waiting_and_suspended(site: Site, operator: rpc.BridgeStub, n2: str) -> None:
    key = site.key()
    wanted = alone()
    wanted.replicas = 2
    job = ensure(operator, key, wanted).slurm_job_id
    running(operator, key, 1)
    # Slurm's main and backfill schedulers write the reason and the expected start at different times. Before one task
    # runs, the other is expected to start at once too.
    pool = until(
        lambda: (
            (p := get(operator, key)).expected_start > p.submitted_at and p.reason in ("Resources", "Priority") and p
        ),
        "Slurm tells why the other waits and when it may start",
    )
    assert (phase(pool), pool.running, pool.queued) == ("RUNNING", 1, 1)
    waiting = next(i for i in ("0", "1") if f"{job}_{i}" not in slurm("squeue", "-h", "-t", "R", "-o", "%i").split())
    slurm("scontrol", "hold", f"{job}_{waiting}")
    until(lambda: get(operator, key).reason.startswith("JobHeld"), "the reason says that it is held")
    assert get(operator, key).queued == 1
    slurm("scontrol", "suspend", f"{job}_{1 - int(waiting)}")
    pool = until(lambda: (p := get(operator, key)).tasks and p, "the suspended task is mentioned")
    assert [task.state for task in pool.tasks] == ["SUSPENDED"]
    assert (pool.running, pool.queued, pool.failed) == (1, 1, 0)
    slurm("scontrol", "resume", f"{job}_{1 - int(waiting)}")
    slurm("scontrol", "release", f"{job}_{waiting}")
    until(lambda: not (p := get(operator, key)).tasks and p.reason in ("Resources", "Priority"), "as it was before")


def test_the_controller_goes_and_comes_back(site: Site, lab: "Lab") -> None:
    site.settings["slurm"]["command_timeout_seconds"] = 2
    operator = site.start()
    key, late = site.key(), site.key()
    wanted = spec()
    ensure(operator, key, wanted)
    running(operator, key)
    # Do not use the first answer: sbatch may have taken longer than these two seconds, and the array was found later.
    first = get(operator, key)
    lab.stop_slurm_daemon("slurmctld")
    try:
        pool = until(lambda: (p := get(operator, key)).phase == pb.Pool.UNKNOWN and p, "the bridge says so", 180)
        assert "Slurm does not answer" in pool.message
        assert (pool.running, pool.failed) == (2, 0), "the last known counts stay"
        # A request while Slurm accepts no jobs waits, and is submitted once.
        assert phase(ensure(operator, late, wanted)) == "UNKNOWN"
    finally:
        lab.start_slurm_daemon("slurmctld")
    until(lambda: get(operator, key).phase == pb.Pool.RUNNING, "the first pool runs on", 180)
    assert site.arrays(key) == {first.slurm_job_id}
    running(operator, late)
    assert site.arrays(late) == {get(operator, late).slurm_job_id}


def test_without_accounting_the_task_markers_show_the_end(
    site: Site, operator: rpc.BridgeStub, amnesia: Callable[[], None]
) -> None:
    key = site.key()
    ensure(operator, key, spec(command=["sh", "-c", 'exit "$ISTHMUS_INDEX"']))
    site.kill()
    until(lambda: not site.arrays(key), "the tasks have ended")
    amnesia()
    assert not slurm("squeue", "-h", "-t", "all", "-o", "%i")
    pool = over(site.start(), key)
    assert (phase(pool), pool.succeeded, pool.failed) == ("FAILED", 1, 1)
    assert [(task.index, task.exit_code) for task in pool.tasks] == [(1, 1)]
