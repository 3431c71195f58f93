"""A pool shrinks in place: its last tasks end, and the others are not affected."""

from pathlib import Path

import pytest

from isthmus_bridge.files.run_directory import RunDirectory
from isthmus_bridge.pools.pools import Denied, NoSuchPool, NothingLeft
from tests.support.fake_slurm import KEY, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def counts(world: World) -> tuple[int, int, int, int, int]:
    pool = world.pool()
    return pool.desired, pool.queued, pool.running, pool.succeeded, pool.failed


def test_only_the_last_tasks_end(world: World) -> None:
    world.ensure(replicas=5, total_clients=9)
    world.array().states[:] = ["RUNNING", "RUNNING", "RUNNING", "PENDING", "PENDING"]
    world.tick()
    world.shrink(2)
    assert counts(world) == (2, 0, 2, 0, 0)
    world.tick()
    assert world.array().states == ["RUNNING", "RUNNING", "CANCELLED", "CANCELLED", "CANCELLED"]
    world.tick(times=3)
    assert (counts(world), world.phase(), world.pool().message) == ((2, 0, 2, 0, 0), "RUNNING", "")
    # The pool's original request may be repeated, but the pool never grows.
    assert world.ensure(replicas=5, total_clients=9).array_id == world.array().id
    assert world.shrink(4).pool_spec().replicas == 2
    world.array().states[:2] = ["COMPLETED", "COMPLETED"]
    world.tick()
    assert (counts(world), world.phase()) == ((2, 0, 0, 2, 0), "SUCCEEDED")


def test_what_is_not_submitted_yet_is_submitted_smaller(world: World) -> None:
    world.slurm.script = ["full"]
    world.ensure()
    world.shrink(1)
    world.tick(31)
    assert world.array().states == ["PENDING"]
    assert "POOL_SIZE=3" in RunDirectory(world.policy.run_dir, KEY).script.read_text(), "its clients are told the same"


def test_a_restarted_bridge_completes_the_shrink(world: World) -> None:
    world.slurm.script = ["heard"]
    world.ensure()
    world.shrink(1)
    world.boot()
    world.tick(times=2)
    assert world.array().states == ["PENDING", "CANCELLED", "CANCELLED"]
    assert world.phase() == "PENDING"


def test_jobs_that_hold_a_client_that_stays_go_on(world: World) -> None:
    world.ensure(replicas=6, total_clients=9, clients_per_job=2)
    world.array().states[:] = ["RUNNING", "RUNNING", "RUNNING"]
    world.tick()
    world.shrink(3)
    world.tick()
    assert world.array().states == ["RUNNING", "RUNNING", "CANCELLED"]
    assert counts(world) == (3, 0, 3, 0, 0)


def test_an_array_that_the_accounts_alone_know_leaves_no_task_behind(world: World) -> None:
    """squeue does not list it yet, and sacct reports that the remaining client has ended."""
    world.slurm.script = ["slow"]
    world.ensure()
    world.shrink(1)
    world.array().states[0] = "COMPLETED"
    world.slurm.down = "away"
    world.tick()
    world.slurm.down = ""
    world.tick()
    assert world.phase() == "SUCCEEDED"
    assert world.array().states == ["COMPLETED", "CANCELLED", "CANCELLED"]


def test_impossible_shrink_requests(world: World) -> None:
    with pytest.raises(NoSuchPool):
        world.shrink(2)
    world.ensure()
    with pytest.raises(NothingLeft, match="CancelPool ends it"):
        world.shrink(0)


def test_totals_count_what_stays(tmp_path: Path) -> None:
    world = World(tmp_path, limits={"total_tasks": 4})
    world.ensure()
    world.shrink(1)
    assert world.ensure("f" * 32).pool_spec().replicas == 3


def test_totals_count_all_clients_of_a_shared_job_that_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, limits={"total_tasks": 8})
    world.ensure(replicas=7, total_clients=9, clients_per_job=4)
    world.shrink(1)
    with pytest.raises(Denied, match=r"limits\.total_tasks: 5 more than the 4 that"):
        world.ensure("e" * 32, replicas=5, total_clients=9)
    assert world.ensure("f" * 32, replicas=4, total_clients=9).pool_spec().replicas == 4
