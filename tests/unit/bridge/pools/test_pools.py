"""The life of a pool, as callers see it."""

import time
from pathlib import Path

import pytest

from isthmus_bridge.files.run_directory import RunDirectory
from isthmus_bridge.pools.housekeeping import clean_up
from isthmus_bridge.pools.journal import State
from isthmus_bridge.pools.pools import Denied, KeyTaken, NoSuchPool, Pools, SpecDiffers
from isthmus_bridge.pools.spec_checks import RequestError
from tests.support.fake_slurm import KEY, NAME, OPERATOR, Array, World, spec


def test_waiting_running_succeeded(world: World) -> None:
    world.ensure()
    world.tick()
    pool = world.pool()
    assert (world.phase(), pool.queued, pool.reason) == ("PENDING", 3, "Resources")
    world.array().states = ["RUNNING", "PENDING", "CONFIGURING"]
    world.tick()
    pool = world.pool()
    assert (world.phase(), pool.queued, pool.running) == ("RUNNING", 2, 1)
    assert [(task.index, task.state) for task in pool.tasks] == [(2, "CONFIGURING")]
    assert (world.policy.run_dir / KEY / "tls").is_dir()
    world.array().states = ["COMPLETED"] * 3
    world.tick()
    assert (world.phase(), world.pool().succeeded) == ("SUCCEEDED", 3)
    assert not (world.policy.run_dir / KEY / "tls").exists(), "credentials outlive the pool"


def test_every_change_has_a_higher_version_and_no_change_has_none(world: World) -> None:
    world.ensure()
    world.tick()
    version = world.pool().version
    world.tick(times=3)
    assert world.pool().version == version
    world.array().states[0] = "RUNNING"
    world.tick()
    assert world.pool().version > version


def test_a_failed_task_among_living_ones(world: World) -> None:
    world.ensure()
    array = world.array()
    array.states, array.exit_codes = ["FAILED", "RUNNING", "PENDING"], [3, 0, 0]
    log = world.policy.run_dir / KEY / "logs" / "0.log"
    log.write_text("".join(f"line {number}\n" for number in range(50)) + "ValueError: no such column\n")
    world.tick()
    pool = world.pool()
    assert (world.phase(), pool.failed, pool.message) == ("RUNNING", 1, "task 0: FAILED, exit code 3")
    (task,) = pool.tasks
    assert (task.exit_code, task.node) == (3, "n1")
    assert task.log_tail.splitlines()[-1] == "ValueError: no such column"
    assert len(task.log_tail.splitlines()) == 20


def test_all_over_with_a_failure(world: World) -> None:
    world.ensure()
    world.array().states = ["TIMEOUT", "COMPLETED", "NODE_FAIL"]
    world.tick()
    assert world.phase() == "FAILED"
    assert world.pool().message == "2 of 3 tasks did not succeed; task 0: TIMEOUT"


def test_a_cancellation_by_another_user_is_a_failure(world: World) -> None:
    world.ensure()
    world.array().states = ["CANCELLED"] * 3
    world.tick()
    assert (world.phase(), world.pool().message) == ("FAILED", "all tasks were cancelled, but not by the bridge")


def test_cancel(world: World) -> None:
    world.ensure()
    world.tick()
    world.cancel()
    world.tick(times=2)
    assert (world.phase(), world.pool().message) == ("CANCELLED", "cancelled: deleted")
    assert world.slurm.living() == []
    assert world.cancel().state is State.CANCELLED
    assert not (world.policy.run_dir / KEY / "tls").exists()


def test_cancel_is_repeated_until_slurm_confirms(world: World) -> None:
    world.ensure()
    world.tick()
    world.slurm.down = "Unable to contact slurm controller"
    world.cancel()
    world.tick(5.0, times=10)
    assert world.phase() == "UNKNOWN"
    world.slurm.down = ""
    world.tick(times=3)
    assert world.phase() == "CANCELLED"


def test_cancel_of_an_unknown_key_leaves_a_tombstone(world: World) -> None:
    world.cancel()
    assert world.phase() == "CANCELLED"
    world.ensure()
    world.tick(times=3)
    assert (world.phase(), world.slurm.submissions) == ("CANCELLED", 0)


@pytest.mark.parametrize("user", [None, "nobody"])
@pytest.mark.parametrize("late", [0.0, 100_000.0])
def test_cancel_of_a_pool_that_the_journal_has_lost_ends_its_array(
    tmp_path: Path, user: str | None, late: float
) -> None:
    world = World(
        tmp_path, identities=[{"uri": OPERATOR, "user": user}], users={"run_dir": f"{tmp_path}/of/{{user}}/isthmus"}
    )
    mine = Array(77, NAME, ["RUNNING"] * 3, [0] * 3, world.now, user or "")
    another = Array(78, NAME, ["RUNNING"], [0], world.now, "" if user else "nobody")
    world.slurm.arrays += [mine, another]
    world.tick(late / 100 + 1, times=100)
    assert mine.lives
    woken: list[bool] = []
    assert world.journal is not None
    Pools(
        world.current_policy, world.journal, world.auditor, lambda key: None, lambda: woken.append(True), world.clock
    ).cancel(world.identity, KEY, "deleted")
    assert woken and world.phase() == "CANCELLED"
    world.tick()
    assert not mine.lives and another.lives


def test_cancel_before_submission(world: World) -> None:
    world.slurm.script = ["full"]
    world.ensure()
    assert (world.phase(), world.pool().queued) == ("SUBMITTING", 3)
    assert "job submit limit" in world.pool().message
    world.cancel()
    assert (world.phase(), world.slurm.arrays) == ("CANCELLED", [])


def test_cancel_of_a_doubtful_submission_that_turns_up(world: World) -> None:
    world.slurm.script = ["heard"]
    world.ensure()
    world.cancel()
    world.tick(times=3)
    assert world.phase() == "CANCELLED"
    assert world.slurm.living() == []
    assert len(world.slurm.arrays) == 1


def test_cancel_of_a_doubtful_submission_that_never_was(world: World) -> None:
    world.slurm.script = ["lost"]
    world.ensure()
    world.cancel()
    world.tick(10.0, times=10)
    assert (world.phase(), world.slurm.submissions) == ("CANCELLED", 1)


@pytest.mark.parametrize("answer", ["ok", "heard", "lost", "full", "refused"])
def test_cancel_in_the_middle_of_the_submission(world: World, answer: str) -> None:
    world.slurm.script = [answer]
    world.slurm.interrupts = [world.cancel]
    world.ensure()
    world.tick(10.0, times=10)
    assert world.phase() in ("CANCELLED", "FAILED")
    assert (world.slurm.submissions, world.slurm.living()) == (1, [])


@pytest.mark.parametrize("answer", ["heard", "lost"])
def test_cancel_in_the_middle_of_a_look_up(world: World, answer: str) -> None:
    world.slurm.script = [answer]
    world.ensure()
    for _ in range(6):
        world.slurm.interrupts = [world.cancel]
        world.tick(8.0)
    world.tick(8.0, times=10)
    assert (world.phase(), world.slurm.submissions, world.slurm.living()) == ("CANCELLED", 1, [])


def test_cancel_just_before_sbatch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "write_scripts", lambda *_: world.cancel())
    world.ensure()
    world.tick()
    assert (world.phase(), world.slurm.submissions) == ("CANCELLED", 0)


def test_only_folders_that_the_bridge_made_are_removed_or_written_to(world: World) -> None:
    own, foreign, leading = "0" * 32, world.policy.run_dir / "webserver1", world.policy.run_dir / ("1" * 32)
    RunDirectory(world.policy.run_dir, own).create({"tls.key": b"x"})
    (foreign / "tls").mkdir(parents=True)
    (foreign / "thesis.txt").write_text("three years of work")
    leading.symlink_to(foreign)
    assert world.journal is not None
    clean_up(world.policy, world.journal, world.auditor, time.time() + 120)
    assert not (world.policy.run_dir / own).exists()
    assert (foreign / "thesis.txt").exists() and (foreign / "tls").exists() and leading.is_symlink()
    with pytest.raises(OSError, match=r"holds files that the bridge has not made|not a private folder"):
        RunDirectory(world.policy.run_dir, foreign.name).create({"tls.key": b"x"})
    with pytest.raises(OSError, match="not a private folder"):
        RunDirectory(world.policy.run_dir, leading.name).create({"tls.key": b"x"})
    assert sorted(path.name for path in foreign.iterdir()) == ["thesis.txt", "tls"]
    # A directory that the bridge could not mark before it was killed is empty, and is reused.
    (world.policy.run_dir / own).mkdir(mode=0o700)
    assert RunDirectory(world.policy.run_dir, own).create({"tls.key": b"x"}) is False


def test_marks_count_while_the_accounts_do_not_answer(world: World) -> None:
    world.ensure()
    world.tick()
    run = world.policy.run_dir / KEY
    for index in range(3):
        (run / "tasks" / f"{index}.start").write_text(f"{world.array().id} 0 n1\n")
        (run / "tasks" / f"{index}.exit").write_text(f"{world.array().id} 0 0\n")
    world.array().states = ["RUNNING"] * 3
    world.tick()
    world.array().visible = False
    world.slurm.accounts_down = "slurmdbd is away"
    world.tick(2.0, times=3)
    assert world.phase() == "SUCCEEDED"


def test_a_callers_tombstones_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus_bridge.pools.pools.MAX_TOMBSTONES", 5)
    for number in range(5):
        world.pools.cancel(world.identity, f"{number:032d}", "")
    with pytest.raises(Denied, match="has cancelled 5 keys that it never requested"):
        world.pools.cancel(world.identity, "f" * 32, "")
    world.ensure()
    world.cancel()


def test_a_finished_pool_does_not_keep_the_jobs_files(world: World) -> None:
    world.ensure(code={"train.py": b"x" * 100_000})
    assert len(world.entry().spec) > 100_000
    world.tick()
    world.array().states = ["COMPLETED"] * 3
    world.tick()
    assert world.phase() == "SUCCEEDED" and len(world.entry().spec) < 2_000
    # An identical request is still recognized, and a different one is still refused.
    assert world.ensure(code={"train.py": b"x" * 100_000}).state is State.SUCCEEDED
    with pytest.raises(SpecDiffers):
        world.ensure(code={"train.py": b"y"})


def test_a_full_queue_is_waited_for(world: World) -> None:
    world.slurm.script = ["full", "full"]
    world.ensure()
    world.tick(10.0, times=10)
    assert (world.phase(), world.slurm.submissions) == ("PENDING", 3)


def test_a_site_without_room_is_waited_for_as_long_as_the_pool_may_queue(world: World) -> None:
    world.slurm.script = ["full"] * 200
    world.ensure(max_queue_seconds=7200)
    world.tick(60.0, times=100)
    assert (world.phase(), world.pool().message) == ("SUBMITTING", "Slurm refused: job submit limit")
    world.tick(60.0, times=30)
    assert (world.phase(), world.pool().message) == ("FAILED", "Slurm refused: job submit limit")


def test_an_account_that_the_controller_does_not_know_is_tried_for_an_hour(world: World) -> None:
    world.slurm.script = ["late account"] * 200
    world.ensure(max_queue_seconds=86400)
    world.tick(60.0, times=50)
    assert world.phase() == "SUBMITTING"
    world.tick(60.0, times=20)
    assert world.phase() == "FAILED"


def test_a_full_queue_in_which_sbatch_itself_waits_uses_up_no_tries(world: World) -> None:
    world.slurm.script = ["no room"] * 100
    world.ensure(max_queue_seconds=86400)
    for _ in range(11):
        world.tick(30.0, times=10)
        assert world.phase() in ("UNKNOWN", "SUBMITTING")
        assert world.pool().message == "Slurm has no room for it: sleeping and retrying"
    assert world.slurm.submissions > 10
    world.slurm.script.clear()
    world.tick(30.0, times=20)
    assert (world.phase(), world.slurm.doubles, len(world.slurm.arrays)) == ("PENDING", 0, 1)
    assert not world.pool().message


def test_a_refusal_is_final_and_shows_slurms_message(world: World) -> None:
    world.slurm.script = ["refused"]
    world.ensure()
    world.tick(60.0, times=5)
    assert (world.phase(), world.pool().message) == ("FAILED", "Slurm refused: Invalid account")
    assert world.slurm.submissions == 1


def test_slurm_is_away_for_a_while(world: World) -> None:
    world.ensure()
    world.array().states = ["RUNNING"] * 3
    world.tick()
    world.slurm.down = "squeue did not answer in time"
    world.tick(times=2)
    assert world.phase() == "RUNNING", "one bad moment is no news"
    world.tick(times=2)
    pool = world.pool()
    assert (world.phase(), pool.running) == ("UNKNOWN", 3)
    assert "did not answer in time" in pool.message
    world.slurm.down = ""
    world.tick()
    assert (world.phase(), world.pool().message) == ("RUNNING", "")


def test_tasks_that_left_the_queue_are_found_in_the_accounts(world: World) -> None:
    world.ensure()
    array = world.array()
    array.states = ["RUNNING"] * 3
    world.tick()
    array.states, array.exit_codes, array.visible = ["COMPLETED", "COMPLETED", "FAILED"], [0, 0, 9], False
    world.tick()
    assert (world.phase(), world.pool().succeeded, world.pool().tasks[0].exit_code) == ("FAILED", 2, 9)


def test_failing_accounting_ends_no_task(world: World) -> None:
    world.ensure()
    array = world.array()
    array.states = ["RUNNING"] * 3
    world.tick()
    array.states, array.visible = ["COMPLETED"] * 3, False
    world.slurm.accounts_down = "sacct did not answer in time"
    world.tick(20.0, times=30)
    assert world.phase() == "RUNNING"
    world.slurm.accounts_down = ""
    world.tick(20.0, times=2)
    assert world.phase() == "SUCCEEDED"


def test_tasks_that_are_found_nowhere_are_lost_only_after_a_while(world: World) -> None:
    world.slurm.keeps_accounts = False
    world.ensure()
    array = world.array()
    array.states = ["RUNNING", "RUNNING", "COMPLETED"]
    world.tick()
    array.visible = False
    (world.policy.run_dir / KEY / "tasks" / "0.exit").write_text(f"{array.id} 0 0\n")
    world.tick(times=10)
    assert (world.phase(), world.pool().succeeded) == ("RUNNING", 2)
    world.tick(10.0, times=6)
    assert world.phase() == "FAILED"
    (task,) = world.pool().tasks
    assert (task.index, task.state, task.reason) == (1, "LOST", "last seen RUNNING")


def test_a_requeued_task_waits_again(world: World) -> None:
    world.ensure()
    array = world.array()
    array.states = ["RUNNING", "NODE_FAIL", "RUNNING"]
    world.tick()
    assert world.pool().failed == 1
    array.states[1] = "PENDING"
    world.tick()
    assert (world.pool().failed, world.pool().queued) == (0, 1)


def test_callers_see_only_their_own(world: World) -> None:
    world.ensure()
    other = world.policy.identities[1]
    with pytest.raises(NoSuchPool):
        world.pools.get(other, KEY)
    with pytest.raises(NoSuchPool):
        world.pools.cancel(other, KEY, "")
    with pytest.raises(KeyTaken):
        world.pools.ensure(other, KEY, spec())


def test_a_denied_or_malformed_request_leaves_nothing(world: World) -> None:
    with pytest.raises(Denied, match=r"^policy partitions: 'gpu' is not allowed for isthmus://operator/prod; allowed"):
        world.ensure(partition="gpu")
    with pytest.raises(RequestError, match=r"^key: "):
        world.ensure(key="../../etc")
    assert world.journal is not None and world.journal.live() == []
    assert not world.policy.run_dir.exists()


def test_the_cap_on_live_pools(tmp_path: object) -> None:
    from pathlib import Path

    world = World(Path(str(tmp_path)), limits={"pools": 1})
    world.ensure()
    with pytest.raises(Denied, match=r"^policy limits\.pools: isthmus://operator/prod has 1 live pools") as caught:
        world.ensure(key="another-key")
    assert caught.value.transient
    assert not (world.policy.run_dir / "another-key").exists()
    world.ensure()
    world.array().states = ["COMPLETED"] * 3
    world.tick()
    world.ensure(key="another-key")


def test_a_stricter_policy_after_a_restart_holds_for_what_waits(world: World) -> None:
    world.slurm.script = ["full"]
    world.ensure(partition="debug")
    world.policy = world.policy.model_copy(update={"partitions": ["main"]})
    world.boot()
    world.tick(60.0)
    assert world.phase() == "FAILED"
    assert world.pool().message.startswith("policy partitions: 'debug' is not allowed")
