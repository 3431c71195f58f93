"""Requests from several threads, a bridge that is killed repeatedly, and an sbatch with random faults.

The suite runs a short version. ISTHMUS_CHAOS=full runs 200 operations from 8 threads and kills the bridge 20 times; a
number after a colon seeds the random generator (``full:7``).
"""

import json
import os
import random
import subprocess
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
import pytest

from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from tests.support.ports import free_port

from .slurm_site import Site, over, slurm, spec, until

# The commands of pools, by the phase in which they end if they are not cancelled.
COMMANDS = {
    "SUCCEEDED": ["true"],
    "FAILED": ["sh", "-c", "exit 3"],
    "CANCELLED": ["sleep", "600"],  # all of these are cancelled at the end
}
SLURM_STATES = {"SUCCEEDED": {"COMPLETED"}, "FAILED": {"FAILED"}}
DEAD = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# Message of a pool whose submissions all left no array, which can happen by chance.
GIVEN_UP = "times and left no array"


@dataclass
class Queue:
    """Everything that Slurm's queue has shown of the test's keys."""

    states: dict[str, dict[str, dict[str, str]]] = field(default_factory=lambda: defaultdict(dict))
    """Last known state by name, array and task. "N/A" stands for the tasks of an array cancelled as a whole."""
    doubles: list[str] = field(default_factory=list)
    looks: int = 0

    def look(self) -> None:
        living: dict[str, set[str]] = defaultdict(set)
        seen: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for line in slurm("squeue", "-h", "-r", "-t", "all", "-o", "%j %F %K %T").splitlines():
            name, array, index, state = line.split()
            seen[name, array][index] = state
            if state not in DEAD:
                living[name].add(array)
        for (name, array), tasks in seen.items():
            self.states[name][array] = tasks
        self.doubles += [f"{name}: {sorted(arrays)}" for name, arrays in living.items() if len(arrays) > 1]
        self.looks += 1

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.3):
            # A busy controller may not answer one poll; the next one follows.
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.look()


@dataclass
class Demand:
    """Requests of the threads."""

    wanted: dict[str, str] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.mark.timeout(1800)
def test_chaos(site: Site) -> None:
    size, _, seed = os.environ.get("ISTHMUS_CHAOS", "short").partition(":")
    operations, threads, kills = (200, 8, 20) if size == "full" else (40, 8, 4)
    site.settings["slurm"]["command_timeout_seconds"] = 2
    site.settings["limits"] = {"pools": 1000}
    site.settings["listen"] = f"127.0.0.1:{free_port()}"  # the same port after each kill
    site.start()
    site.mode("random")
    queue, demand, done = Queue(), Demand(left=operations), threading.Event()
    watcher = threading.Thread(target=queue.watch, args=(done,), daemon=True)
    watcher.start()
    began = time.monotonic()
    try:
        _disorder(site, demand, threads, kills, random.Random(int(seed or 4)))  # noqa: S311
        site.mode("")
        operator = site.stub()
        for key, end in demand.wanted.items():
            if end == "CANCELLED" and key not in demand.cancelled:
                _cancel(operator, key)
        ends = {key: over(operator, key, 300) for key in demand.wanted}
    finally:
        done.set()
        watcher.join()
    queue.look()
    assert queue.doubles == []
    wrong = [problem for key, pool in ends.items() if (problem := _disagreement(queue, demand, key, pool))]
    assert wrong == []
    report = {"operations": operations, "threads": threads, "kills": kills, "keys": len(ends), "looks": queue.looks,
              "cancelled": len(demand.cancelled), "seconds": round(time.monotonic() - began)}  # fmt: skip
    print(json.dumps(report))


def _disorder(site: Site, demand: Demand, threads: int, kills: int, dice: random.Random) -> None:
    with ThreadPoolExecutor(threads) as pool:
        seeds = [dice.random() for _ in range(threads)]
        callers = [pool.submit(_call, site, demand, random.Random(seed)) for seed in seeds]  # noqa: S311
        for left in _spread(demand.left, kills):
            until(lambda: demand.left <= left, f"{left} operations are left", 300)  # noqa: B023
            time.sleep(dice.uniform(0.0, 0.6))  # a random moment: there is no condition to wait for
            site.kill()
            site.start()
        for caller in callers:
            caller.result()


def _spread(operations: int, kills: int) -> list[int]:
    """Return the number of operations left at each kill."""
    return [operations - operations * number // (kills + 1) for number in range(1, kills + 1)]


def _call(site: Site, demand: Demand, dice: random.Random) -> None:
    """Ensure new pools, and repeat and cancel others, until the operations are used up."""
    operator = site.stub()
    while True:
        with demand.lock:
            if demand.left <= 0:
                return
            demand.left -= 1
            known = sorted(demand.wanted)
            what = dice.choice(["new", "new", "again", "cancel"]) if known else "new"
            if what == "new":
                key, end = site.key(), dice.choice(sorted(COMMANDS))
                demand.wanted[key] = end
            else:
                key = dice.choice(known)
                end = demand.wanted[key]
            if what == "cancel":
                demand.cancelled.add(key)
        if what == "cancel":
            _cancel(operator, key)
        else:
            wanted = spec(replicas=2, memory_mib=10, command=COMMANDS[end])
            _repeat_until_answered(lambda: operator.EnsurePool(pb.EnsurePoolRequest(key=key, spec=wanted), timeout=60))  # noqa: B023


def _cancel(operator: rpc.BridgeStub, key: str) -> None:
    _repeat_until_answered(lambda: operator.CancelPool(pb.CancelPoolRequest(key=key), timeout=60))


def _repeat_until_answered(call: object) -> None:
    """Repeat a call until it is answered, as the operator does."""
    assert callable(call)

    def answered() -> bool:
        try:
            call()
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error
            return False
        return True

    until(answered, "the bridge answers", 300)


def _disagreement(queue: Queue, demand: Demand, key: str, pool: pb.Pool) -> str:
    """Return the difference between the bridge's final state and Slurm's; empty if they agree."""
    phase, arrays = pb.Pool.Phase.Name(pool.phase), queue.states[slurm_job_name(key)]
    said = f"{key}: {phase} ({pool.message}), job {pool.slurm_job_id!r}; Slurm: {json.dumps(arrays)}"
    if len(arrays) > 1:
        return f"submitted twice: {said}"
    if any(state not in DEAD for tasks in arrays.values() for state in tasks.values()):
        return f"over, yet it lives: {said}"
    end = demand.wanted[key]
    if phase == "FAILED" and not arrays and GIVEN_UP in pool.message:
        return ""
    if key in demand.cancelled or end == "CANCELLED":
        # A pool that ended by itself before the bridge received the cancellation keeps that end.
        return "" if phase == "CANCELLED" or (arrays and phase == end) else f"should be cancelled: {said}"
    if set(arrays) != {pool.slurm_job_id}:
        return f"lost: {said}"
    states = set(arrays[pool.slurm_job_id].values())
    return "" if phase == end and states == SLURM_STATES[end] else f"they disagree: {said}"
