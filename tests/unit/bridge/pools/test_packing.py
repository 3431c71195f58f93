"""Several clients in one job: each has its own end, independent of Slurm's state of the job."""

from pathlib import Path

import pytest

from isthmus_bridge.clients_per_job import jobs_for
from isthmus_bridge.files.run_directory import RunDirectory, TaskMarker
from isthmus_bridge.policy.authorization import Denial, Grant, decide, too_many
from isthmus_bridge.policy.current import CurrentPolicy
from isthmus_bridge.policy.parts import Limits
from isthmus_bridge.pools.clients import by_client, markers_of_jobs
from isthmus_bridge.pools.observation import ClientNote, Observation, TaskObservation
from isthmus_bridge.pools.submitter import submission
from tests.support.fake_slurm import KEY, World, policy, spec

PACKED = {"replicas": 5, "total_clients": 9, "clients_per_job": 2}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def leave(world: World, client: int, code: int, restarts: int = 0) -> None:
    """Write the marker of a client's end."""
    run = RunDirectory(world.policy.run_dir, KEY)
    (run.path / "tasks" / f"{client}.exit").write_text(f"{world.array().id} {restarts} {code}\n")


def counts(world: World) -> tuple[int, int, int, int]:
    pool = world.pool()
    return pool.queued, pool.running, pool.succeeded, pool.failed


def test_clients_are_counted_and_one_that_fails_leaves_its_job_alone(world: World) -> None:
    world.ensure(**PACKED)
    assert len(world.array().states) == 3
    assert counts(world) == (5, 0, 0, 0)
    world.array().states[:] = ["RUNNING", "PENDING", "PENDING"]
    world.tick()
    assert counts(world) == (3, 2, 0, 0)
    run = RunDirectory(world.policy.run_dir, KEY)
    run.log(0).write_text("no such column\n")
    leave(world, 0, 3)
    world.tick()
    assert counts(world) == (3, 1, 0, 1)
    (task,) = world.pool().tasks
    assert (task.index, task.state, task.exit_code, task.log_tail) == (0, "FAILED", 3, "no such column")
    world.array().states[:] = ["FAILED", "COMPLETED", "COMPLETED"]
    leave(world, 1, 0)
    world.tick()
    assert (counts(world), world.phase()) == ((0, 0, 4, 1), "FAILED")
    assert world.pool().message == "1 of 5 tasks did not succeed; task 0: FAILED, exit code 3"


@pytest.mark.parametrize("code", [256, 99999999999, 2147483647])
def test_a_number_that_is_no_exit_code_is_no_end(world: World, code: int) -> None:
    world.ensure(**PACKED)
    world.array().states[:] = ["RUNNING"] * 3
    leave(world, 0, code)
    leave(world, 1, 255)
    world.tick()
    assert [(task.index, task.exit_code) for task in world.pool().tasks] == [(1, 255)]
    run = RunDirectory(world.policy.run_dir, KEY)
    assert {index: mark.exit_code for index, mark in run.task_markers().items()} == {0: None, 1: 255}


def test_what_a_former_start_left_behind_says_nothing_of_the_next(world: World) -> None:
    job = TaskObservation("RUNNING", restarts=1, job_id=7)
    seen = Observation({0: job}, clients={0: ClientNote(0, 3, "old"), 1: ClientNote(1, 0)})
    tasks = by_client(seen, spec(**PACKED)).tasks
    assert (tasks[0], tasks[1].state) == (job, "COMPLETED")
    assert Observation.from_json(seen.to_json()) == seen


def test_a_job_whose_launch_fails_shows_its_own_log(world: World) -> None:
    world.ensure(**PACKED)
    world.array().states[:] = ["FAILED", "RUNNING", "RUNNING"]
    world.array().exit_codes[0] = 127
    log = RunDirectory(world.policy.run_dir, KEY).path / "logs" / "job-0.log"
    log.write_text("srun: not found\n")
    world.tick()
    assert counts(world) == (0, 3, 0, 2)
    assert [(t.index, t.exit_code, t.log_tail) for t in world.pool().tasks] == [
        (0, 127, "srun: not found"), (1, 127, "srun: not found"),
    ]  # fmt: skip


def test_the_time_limit_is_reported_for_every_client_that_it_ended() -> None:
    seen = Observation({0: TaskObservation("TIMEOUT")}, clients={0: ClientNote(0, 143), 1: ClientNote(0, 0)})
    tasks = by_client(seen, spec(**PACKED)).tasks
    assert [(t.state, t.exit_code) for t in tasks.values()] == [("TIMEOUT", 143), ("COMPLETED", 0)]


def test_a_jobs_end_by_its_clients_marks() -> None:
    marks = {0: TaskMarker(9, "n1", 0), 1: TaskMarker(9, "n1", 4), 2: TaskMarker(9, "n1", 0), 4: TaskMarker(9, "n2", 0)}
    ends = {index: mark.exit_code for index, mark in markers_of_jobs(marks, spec(**PACKED)).items()}
    assert ends == {0: 4, 1: None, 2: 0}


def test_a_job_holds_what_its_clients_need_together(tmp_path: Path) -> None:
    site = policy(tmp_path, limits={"cpus_per_task": 8, "memory_mib": 1000, "gres": {"gpu": 4}, "running_tasks": 5})
    request = spec(**PACKED, cpus_per_task=4, memory_mib=500, gres=[{"name": "gpu", "count": 2}])
    grant = decide(site, site.identities[0], request)
    assert isinstance(grant, Grant)
    asked = submission(site, KEY, site.identities[0].uri, request, grant, RunDirectory(site.run_dir, KEY))
    assert (asked.tasks, asked.steps, asked.cpus_per_task, asked.memory_mib) == (3, 2, 4, 1000)
    assert (asked.gres[0].count, asked.at_once) == (4, 2)
    assert jobs_for(request) == 3


@pytest.mark.parametrize(
    ("change", "limits", "rule"),
    [
        ({"cpus_per_task": 5}, {"cpus_per_task": 8}, "limits.cpus_per_task"),
        ({"memory_mib": 501}, {"memory_mib": 1000}, "limits.memory_mib"),
        ({"gres": [{"name": "gpu", "count": 2}]}, {"gres": {"gpu": 3}}, "limits.gres"),
        ({}, {"running_tasks": 1}, "limits.running_tasks"),
    ],
)
def test_caps_hold_for_the_whole_job(
    tmp_path: Path, change: dict[str, object], limits: dict[str, object], rule: str
) -> None:
    site = policy(tmp_path, limits=limits)
    denial = decide(site, site.identities[0], spec(**PACKED, **change))
    assert isinstance(denial, Denial) and denial.rule == rule


def test_totals_count_what_the_last_job_holds_idle(tmp_path: Path) -> None:
    site = policy(tmp_path, limits=Limits(total_cpus=5).model_dump())
    denial = too_many(CurrentPolicy(site).policy, site.identities[0], spec(**PACKED), [], 0)
    assert denial is not None and denial.rule == "limits.total_cpus"
