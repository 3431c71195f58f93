"""Arrays that a user or the site has renamed, and jobs of the bridge's user that belong to no pool."""

import pytest

from isthmus_bridge.pools.journal import State
from isthmus_bridge.slurm.environment import user_name
from tests.support.fake_slurm import KEY, NAME, Array, World


def array(world: World) -> Array:
    """Return the only array."""
    (one,) = world.slurm.arrays
    return one


@pytest.fixture
def renamed(world: World) -> World:
    """Return a world in which two of three tasks run, and all were renamed."""
    world.ensure()
    world.tick()
    array(world).states[:2] = ["RUNNING", "RUNNING"]
    array(world).name = "better"
    return world


def test_a_renamed_array_is_followed_and_never_submitted_again(renamed: World) -> None:
    renamed.tick(times=60)
    assert (renamed.phase(), renamed.pool().running, renamed.pool().queued) == ("RUNNING", 2, 1)
    assert renamed.slurm.submissions == 1
    renamed.boot()
    renamed.tick(times=60)
    assert (renamed.phase(), renamed.slurm.submissions) == ("RUNNING", 1)


def test_a_renamed_array_is_cancelled_under_its_new_name(renamed: World) -> None:
    renamed.cancel()
    renamed.tick(times=2)
    assert renamed.slurm.living("better") == []
    renamed.tick(times=2)
    assert renamed.phase() == "CANCELLED"


def test_a_renamed_array_that_left_the_queue_is_found_in_the_accounts(renamed: World) -> None:
    renamed.tick()
    # Another job with that name is not a task of the pool.
    renamed.slurm.arrays.append(Array(9_000, "better", ["FAILED"] * 3, [1] * 3, renamed.now))
    array_of_pool = renamed.slurm.arrays[0]
    array_of_pool.states, array_of_pool.visible = ["COMPLETED"] * 3, False
    renamed.boot()
    renamed.tick(times=3)
    assert renamed.phase() == "SUCCEEDED"


def test_a_doubtful_submission_is_found_under_any_name(world: World) -> None:
    world.slurm.script = ["heard"]
    world.ensure()
    array(world).name = "job_submit.lua gave me this"
    world.tick(times=60)
    assert (world.entry().state, world.entry().array_id) == (State.SUBMITTED, array(world).id)
    assert world.slurm.submissions == 1


def test_a_job_of_another_user_in_the_same_directory_is_not_the_pools(renamed: World) -> None:
    array(renamed).user = "mallory"
    renamed.tick(times=60)
    assert renamed.phase() == "FAILED"


def test_an_array_named_like_another_pool_stays_with_its_directory(renamed: World) -> None:
    other = KEY[::-1]
    renamed.ensure(other)
    array_of_pool = renamed.slurm.arrays[0]
    array_of_pool.name = f"isthmus-{other}"
    renamed.tick(times=3)
    assert array_of_pool.states == ["RUNNING", "RUNNING", "PENDING"]
    assert (renamed.phase(), renamed.phase(other)) == ("RUNNING", "PENDING")


def test_jobs_of_the_bridges_user_that_are_of_no_pool_are_counted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def counted() -> float | None:
        return world.metrics.registry.get_sample_value("isthmus_bridge_jobs_without_pool", {"user": user_name({})})

    world.ensure()
    world.tick()
    assert counted() == 0.0
    work = str(world.policy.run_dir / KEY / "work" / "0")
    world.slurm.arrays += [
        Array(900, "mine", ["RUNNING"], [0], world.now, directory=work),
        Array(901, NAME.replace("0", "9"), ["PENDING"] * 2, [0, 0], world.now),
        Array(902, "over", ["COMPLETED"], [0], world.now),
    ]
    world.tick(times=3)
    assert counted() == 2.0
    said = [record.message for record in caplog.records if "belong to no pool" in record.message]
    assert said == [
        f"2 jobs of {user_name({})} belong to no pool, such as job 900, 'mine': the policy does not limit them"
    ]
    assert world.slurm.arrays[1].states == ["RUNNING"], "they are not the bridge's to end"
