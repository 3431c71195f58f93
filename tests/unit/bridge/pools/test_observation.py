import pytest

from isthmus_bridge.files.run_directory import TaskMarker
from isthmus_bridge.pools.observation import (
    Choice,
    Observation,
    TaskObservation,
    choose,
    ended_by_limit,
    observe,
    resolve,
)
from isthmus_bridge.pools.pool_status import describe_end
from isthmus_bridge.slurm.model import TaskRecord


def record(array: int, state: str, *indices: int, job: int = 0, **fields: object) -> TaskRecord:
    return TaskRecord(job or array, array, "isthmus-x", indices or None, state, **fields)  # type: ignore[arg-type]


def test_choose() -> None:
    assert choose([], 0) is None
    assert choose([record(5, "PENDING", 0), record(9, "RUNNING", 0)], 0) == Choice(5, (9,))
    assert choose([record(5, "FAILED", 0), record(9, "RUNNING", 0)], 0) == Choice(9)
    assert choose([record(5, "FAILED", 0), record(9, "COMPLETED", 0)], 0) == Choice(5)
    assert choose([record(5, "PENDING", 0), record(9, "RUNNING", 0)], 9) == Choice(9, (5,))


def test_the_journal_keeps_all_of_it() -> None:
    full = Observation(
        {3: TaskObservation("FAILED", "NonZeroExitCode", 1, 9, "n1", 12, 2, "Traceback")}, "Priority", 5.0, 9.0, True
    )
    assert Observation.from_json(full.to_json()) == full
    older = '{"tasks":{"0":["RUNNING","",0,0,"n1",7,0,""]},"reason":"","start":0.0}'
    assert Observation.from_json(older).tasks[0].node == "n1", "written by a bridge before an upgrade"


@pytest.mark.parametrize(
    ("state", "ends_at", "now", "by_limit"),
    [
        ("TIMEOUT", 0.0, 500.0, True),  # the bridge was down while it ran
        (
            "FAILED",
            1000.0,
            900.0,
            True,
        ),  # it ended after the warning, at 940 or a minute before
        ("COMPLETED", 1000.0, 950.0, True),
        ("FAILED", 1000.0, 800.0, False),
        ("FAILED", 0.0, 990.0, False),
    ],
)
def test_ends_that_the_time_limit_caused(state: str, ends_at: float, now: float, by_limit: bool) -> None:
    ended, before = Observation({0: TaskObservation(state)}), Observation(ends_at=ends_at)
    assert ended_by_limit(ended, before, now, 60.0) is by_limit


def test_the_first_end_of_a_time_limit_is_the_pools() -> None:
    running = [record(7, "RUNNING", index, job=8 + index, ends=100.0 - index) for index in range(2)]
    assert observe([*running, record(7, "PENDING", 2)], 3, Observation())[0].ends_at == 99.0


def test_the_rest_of_a_cancelled_array_does_not_overwrite_what_is_known() -> None:
    old = Observation({0: TaskObservation("COMPLETED"), 1: TaskObservation("RUNNING")})
    seen, missing = observe([record(7, "CANCELLED"), record(7, "CANCELLED", 1, job=9)], 4, old)
    assert missing == []
    assert [seen.tasks[i].state for i in range(4)] == ["COMPLETED", "CANCELLED", "CANCELLED", "CANCELLED"]


def test_a_task_that_is_not_mentioned_keeps_its_end_or_is_missing() -> None:
    old = Observation({0: TaskObservation("FAILED", exit_code=3), 1: TaskObservation("RUNNING", job_id=9)})
    seen, missing = observe([], 3, old)
    assert missing == [1, 2]
    assert seen.tasks[0].exit_code == 3


def test_of_two_records_of_a_task_the_living_one_counts() -> None:
    seen, _ = observe([record(7, "RUNNING", 0, job=8), record(7, "NODE_FAIL", 0, job=9)], 1, Observation())
    assert seen.tasks[0].state == "RUNNING"


def test_small_moves_of_the_expected_start_are_no_news() -> None:
    old, _ = observe([record(7, "PENDING", 0, start=1000.0)], 1, Observation())
    assert observe([record(7, "PENDING", 0, start=1030.0)], 1, old)[0] == old
    assert observe([record(7, "PENDING", 0, start=2000.0)], 1, old)[0].expected_start == 2000.0


def test_ends_from_the_completion_log_by_job_id_then_by_elimination() -> None:
    old = Observation({0: TaskObservation("RUNNING", job_id=8), 1: TaskObservation("RUNNING", job_id=9)})
    history = [
        record(8, "FAILED", job=8, exit_code=2, node="n1"),
        record(9, "COMPLETED", job=9, node="n1"),
        record(7, "CANCELLED", job=7),
        record(3, "FAILED", job=3, node="n1"),  # an earlier array with that name
    ]
    ended, left = resolve(old, [0, 1, 2, 3], 7, history, {})
    assert left == []
    assert [ended.tasks[i].state for i in range(4)] == ["FAILED", "COMPLETED", "CANCELLED", "CANCELLED"]
    assert ended.tasks[0].exit_code == 2


def test_ends_by_elimination_in_the_order_in_which_slurm_numbers_tasks() -> None:
    history = [record(7, "FAILED", job=7, node="n1"), record(8, "COMPLETED", job=8, node="n1")]
    ended, left = resolve(Observation(), [0, 1], 7, history, {})
    assert (left, [ended.tasks[i].state for i in range(2)]) == ([], ["COMPLETED", "FAILED"])


def test_marks_of_another_array_prove_nothing() -> None:
    _, left = resolve(Observation(), [0, 1], 7, [], {0: TaskMarker(7, "n1", 0), 1: TaskMarker(6, "n1", 0)})
    assert left == [1]


def test_a_task_that_could_not_begin_says_why() -> None:
    """Its directory was purged while it waited, which Slurm reports as signal 53 (no such signal exists)."""
    could_not = TaskObservation("FAILED", "JobLaunchFailure", exit_code=15, signal=53)
    why = "Slurm could not start it: its folder or its log cannot be opened on that node"
    assert describe_end(could_not) == f"FAILED, signal 53: {why}"
    assert describe_end(TaskObservation("FAILED", signal=9)) == "FAILED, signal 9"
