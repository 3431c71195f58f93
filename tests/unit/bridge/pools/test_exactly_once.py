"""Never two submissions for one key: crashes, lost answers, duplicates, and look-ups that fail."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from isthmus_bridge.pools.journal import Journal, JournalError, State
from isthmus_bridge.pools.pools import SpecDiffers
from tests.support.fake_slurm import KEY, NAME, Crash, World


def test_the_same_request_twice_submits_once(world: World) -> None:
    first = world.ensure()
    world.tick()
    second = world.ensure()
    assert world.slurm.submissions == 1
    assert first.key == second.key
    assert world.entry().array_id == world.array().id


def test_the_same_request_after_a_restart_submits_once(world: World) -> None:
    world.ensure()
    world.boot()
    world.ensure()
    world.tick(times=5)
    assert world.slurm.submissions == 1


def test_another_spec_under_the_same_key_is_refused_with_the_fields_names(world: World) -> None:
    world.ensure()
    with pytest.raises(SpecDiffers, match=r"differs in: command, replicas"):
        world.ensure(replicas=2, command=["python3"])
    assert world.slurm.submissions == 1


def test_the_journal_and_what_belongs_to_it_are_private_from_the_first_moment(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        world = World(tmp_path)
        world.ensure(env={"SECRET": "hunter2"})
        for _ in range(2):
            files = list(tmp_path.glob("journal.db*"))
            assert any(b"hunter2" in path.read_bytes() for path in files)
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
            # An older bridge may have left them like this.
            for path in files:
                path.chmod(0o644)
            world.boot()
    finally:
        os.umask(before)


def test_other_credentials_are_the_same_spec_and_reach_the_tasks(world: World) -> None:
    from tests.support.fake_slurm import spec

    world.ensure()
    fresh = spec()
    fresh.federation.certificate = b"-----BEGIN CERTIFICATE-----\nBB==\n-----END CERTIFICATE-----\n"
    world.pools.ensure(world.identity, KEY, fresh)
    tls = world.policy.run_dir / KEY / "tls"
    assert (tls / "tls.crt").read_bytes() == fresh.federation.certificate
    assert [oct(p.stat().st_mode & 0o777) for p in sorted(tls.iterdir())] == ["0o600"] * 3
    assert oct(tls.stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("lost_commit", range(6))
@pytest.mark.parametrize("slurm_script", [[], ["heard"], ["lost"], ["crash-before"], ["crash-after"]])
def test_a_crash_after_any_commit_leaves_one_array(world: World, lost_commit: int, slurm_script: list[str]) -> None:
    world.slurm.script = list(slurm_script)
    assert world.journal is not None
    world.journal.commits_left = lost_commit
    for _ in range(3):
        try:
            world.ensure()
            world.tick(5.0, times=30)
        except Crash:
            world.boot()
        assert len(world.slurm.living()) <= 1
    world.ensure()
    world.tick(5.0, times=30)
    assert world.slurm.living() == [world.entry().array_id]
    assert world.phase() == "PENDING"


def test_a_lost_answer_is_adopted(world: World) -> None:
    world.slurm.script = ["heard"]
    world.ensure()
    assert world.phase() == "UNKNOWN"
    assert "did not answer" in world.pool().message
    world.tick()
    assert world.phase() == "PENDING"
    assert world.entry().array_id == world.array().id
    assert world.pool().message == ""


def test_a_submission_that_never_was_is_made_again_only_after_healthy_empty_lookups(world: World) -> None:
    world.slurm.script = ["lost"]
    world.ensure()
    world.tick(1.0, times=29)
    assert world.slurm.submissions == 1
    assert world.phase() == "UNKNOWN"
    world.tick(1.0, times=12)
    assert world.slurm.submissions == 2
    assert world.phase() == "PENDING"


@pytest.mark.parametrize("broken", ["down", "accounts_down"])
def test_a_failed_lookup_is_no_evidence(world: World, broken: str) -> None:
    world.slurm.script = ["lost"]
    world.ensure()
    setattr(world.slurm, broken, "Unable to contact slurm controller")
    world.tick(10.0, times=50)
    assert world.slurm.submissions == 1
    assert world.phase() == "UNKNOWN"
    assert "Unable to contact slurm controller" in world.pool().message
    setattr(world.slurm, broken, "")
    world.tick(10.0, times=5)
    assert world.slurm.submissions == 2


def test_an_sbatch_that_still_runs_is_waited_for(world: World) -> None:
    world.slurm.script = ["lost"]
    world.slurm.sbatch_runs = True
    world.ensure()
    world.tick(10.0, times=50)
    assert world.slurm.submissions == 1
    assert "still runs" in world.pool().message
    world.slurm.sbatch_runs = False
    world.tick(10.0, times=5)
    assert world.slurm.submissions == 2


def test_of_several_arrays_the_lowest_that_lives_is_adopted_and_the_others_end(world: World) -> None:
    world.slurm.script = ["late"]
    world.ensure()
    world.tick(10.0, times=5)
    assert world.slurm.submissions == 2
    first, second = world.slurm.arrays
    first.visible = True  # the array that seemed lost appears
    world.tick()
    assert world.slurm.living() == [second.id] == [world.entry().array_id]
    # If no array is known, the look-up adopts the lowest id.
    world.boot()
    assert world.journal is not None
    world.journal.update(KEY, state=State.UNKNOWN, array_id=0)
    first.states = ["PENDING"] * 3
    world.tick()
    assert world.slurm.living() == [first.id]


def test_an_array_that_turns_up_after_the_end_is_cancelled(world: World) -> None:
    world.slurm.script = ["late"]
    world.ensure()
    world.cancel()
    world.tick(10.0, times=10)
    assert world.phase() == "CANCELLED"
    world.array().visible = True
    world.tick(31.0)
    assert world.slurm.living() == []


def test_a_finished_array_is_adopted_from_the_accounts(world: World) -> None:
    world.slurm.script = ["late"]
    world.ensure()
    array = world.array()
    array.states = ["COMPLETED"] * 3
    world.tick()
    assert world.slurm.submissions == 1
    assert world.phase() == "SUCCEEDED"


def test_a_finished_array_is_adopted_from_its_own_marks_where_no_accounts_are_kept(world: World) -> None:
    world.slurm.keeps_accounts = False
    world.slurm.script = ["lost"]
    world.ensure()
    tasks = world.policy.run_dir / KEY / "tasks"
    for index in range(3):
        (tasks / f"{index}.start").write_text("77 0 n1\n")
        (tasks / f"{index}.exit").write_text(f"77 0 {index}\n")
    world.tick(times=3)
    assert world.slurm.submissions == 1
    assert world.phase() == "FAILED"
    pool = world.pool()
    assert (pool.slurm_job_id, pool.succeeded, pool.failed) == ("77", 1, 2)
    assert [(task.index, task.exit_code, task.node) for task in pool.tasks] == [(1, 1, "n1"), (2, 2, "n1")]


def test_a_lost_journal_does_not_submit_again(world: World) -> None:
    world.ensure()
    assert world.journal is not None
    world.journal.delete(KEY)
    world.ensure()
    assert world.phase() == "UNKNOWN"
    world.tick()
    assert world.slurm.submissions == 1
    assert world.entry().array_id == world.array().id


def test_failing_submissions_end_after_a_limit(world: World) -> None:
    world.slurm.script = ["lost"] * 20
    world.ensure()
    world.tick(10.0, times=100)
    assert world.phase() == "FAILED"
    assert world.slurm.submissions == 5
    assert "sbatch failed 5 times" in world.pool().message


def test_a_second_bridge_on_the_same_journal_does_not_start(world: World) -> None:
    with pytest.raises(JournalError, match="another bridge"):
        Journal(world.policy.journal_path, patience=0.1)


@pytest.mark.parametrize("pragma", ["user_version=3", "application_id=7"])
def test_a_journal_of_another_version_or_program_is_refused(world: World, pragma: str) -> None:
    assert world.journal is not None
    world.journal.close()
    path = world.policy.journal_path
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA {pragma}")
    words = "made by another program or another version of the bridge"
    with pytest.raises(JournalError, match=f"^journal {path}: {words}$"):
        Journal(path)


def test_a_journal_that_was_removed_under_the_bridge_is_written_again(world: World) -> None:
    """Scratch file systems remove old files, and the bridge continues with an open file that has no name."""
    world.ensure()
    assert world.journal is not None
    world.journal.update(KEY, message="after the last checkpoint")
    path = world.policy.journal_path
    assert not world.journal.removed
    path.unlink()
    assert world.journal.removed
    array = world.entry().array_id
    world.boot()
    assert (world.entry().array_id, world.entry().message) == (array, "after the last checkpoint")
    assert path.stat().st_mode & 0o777 == 0o600
    assert not list(path.parent.glob("*.saved*"))
    world.tick(10.0, times=5)
    assert world.slurm.submissions == 1


def test_reused_ids_are_distinguished_by_name(world: World) -> None:
    world.ensure()
    array = world.array()
    # The controller forgot the job, and gave its id to another user's job.
    array.name, array.directory = "isthmus-ffffffffffffffffffffffffffffffff", "/home/somebody"
    world.slurm.keeps_accounts = False
    world.tick(10.0, times=10)
    assert world.phase() == "FAILED"
    assert "no longer knows" in world.pool().message
    assert array.lives, "another's job was touched"
    assert world.slurm.living(NAME) == []


def test_tasks_are_never_lost_while_accounting_fails(world: World) -> None:
    world.ensure()
    world.tick()
    world.array().visible = False
    world.slurm.accounts_down = "sacct: no connection"
    world.tick(1.5, times=200)
    assert world.phase() == "PENDING", world.pool().message
    world.array().visible = True
    world.slurm.accounts_down = ""
    world.tick(1.5, times=2)
    assert world.phase() == "PENDING"
