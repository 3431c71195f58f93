"""Tests of cloud clients: starts, restarts, limits."""

import datetime as dt
from dataclasses import replace

import pytest

from isthmus_operator.planning import actions as act
from isthmus_operator.planning.cloud_pool import restart_delay
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.planning.status import is_urgent
from isthmus_operator.state.job_record import ClientRecord, CloudRecord, Record
from isthmus_operator.state.observed import Observed, PodView
from tests.support.fake_cluster import NOW, UID, World, aggregator, client, job, of_kind, plan, spec, standing

OPTIONS = PlanOptions(cluster="c")
STARTED = Record({"cloud": CloudRecord(2)}).dump(UID)


def started(decided: act.Plan) -> list[str]:
    return [item.name for item in of_kind(decided, act.CreatePod)]


def deleted(decided: act.Plan) -> list[str]:
    return [item.name for item in of_kind(decided, act.DeletePod)]


def around(*pods: PodView) -> Observed:
    return standing(pods=(aggregator(), *pods))


def failed(index: int = 0, attempt: int = 0, **changes: object) -> PodView:
    base = client(index, attempt, "Failed")
    return replace(base, **{"finished": NOW, "exit_code": 1, "reason": "Error", **changes})  # type: ignore[arg-type]


def after(seconds: float) -> dt.datetime:
    return NOW + dt.timedelta(seconds=seconds)


def test_a_failed_client_is_reported_counted_and_restarted() -> None:
    traceback = 'Traceback (most recent call last):\n  File "t.py", line 3\nValueError: no data'
    observed = around(failed(message=traceback), client(1))
    first = plan(job(record=STARTED), observed, NOW, OPTIONS)
    assert not started(first)
    assert [(event.type, event.reason) for event in first.events if "demo-cloud" in event.message] == [
        ("Warning", "ClientFailed")
    ]
    assert "ValueError: no data" in first.status["pools"][0]["reason"]
    assert first.status["pools"][0]["failed"] == 1
    record = first.actions[0]
    assert isinstance(record, act.SaveJob)
    # Reported and counted once.
    second = plan(job(record=record.record, status=first.status), observed, after(1), OPTIONS)
    assert not second.events
    assert not second.actions
    third = plan(job(record=record.record, status=first.status), observed, after(6), OPTIONS)
    assert started(third) == ["demo-cloud-0-1"]


def test_delays_grow_and_are_bounded() -> None:
    assert [restart_delay(times).total_seconds() for times in (1, 2, 3, 7, 1000)] == [5, 10, 20, 300, 300]


def test_the_last_failed_pod_of_a_client_is_kept_for_its_log() -> None:
    decided = plan(job(record=STARTED), around(failed(0, 0), failed(0, 1), client(0, 2), client(1)), NOW, OPTIONS)
    assert deleted(decided) == ["demo-cloud-0-0"]


def test_a_failed_pod_in_which_something_lives_on_is_deleted_once_it_is_replaced() -> None:
    left = failed(lingers=True)
    alone = plan(job(record=STARTED), around(left, client(1)), after(6), OPTIONS)
    assert (started(alone), deleted(alone)) == (["demo-cloud-0-1"], [])
    decided = plan(job(record=STARTED), around(left, client(0, 1), client(1)), after(6), OPTIONS)
    assert deleted(decided) == ["demo-cloud-0-0"]


def test_an_older_attempt_that_still_runs_is_ended() -> None:
    decided = plan(job(record=STARTED), around(client(0, 0), client(0, 1), client(1)), NOW, OPTIONS)
    assert deleted(decided) == ["demo-cloud-0-0"]


@pytest.mark.parametrize("reason", ["Evicted", "NodeShutdown", "Preempting"])
def test_what_the_cluster_ended_is_not_counted(reason: str) -> None:
    pod = failed(exit_code=None, reason=reason, disrupted=True)
    wanted = spec(backoffLimit=0)
    observed = standing(wanted, pods=(aggregator(), pod, client(1)))
    decided = plan(job(wanted, record=STARTED), observed, after(6), OPTIONS)
    assert started(decided) == ["demo-cloud-0-1"]
    assert not [event for event in decided.events if event.reason == "ClientFailed"]
    assert "Failed" not in {item["type"] for item in decided.status["conditions"]}


def test_a_client_that_vanished_is_replaced_at_once_by_a_higher_attempt() -> None:
    decided = plan(job(record=STARTED), around(client(1)), NOW, OPTIONS)
    assert started(decided) == ["demo-cloud-0-1"]
    (save,) = of_kind(decided, act.SaveJob)
    assert Record.load(save.record).cloud["cloud"].client(0).attempt == 1


def test_a_client_that_is_being_deleted_is_replaced_at_once() -> None:
    decided = plan(job(record=STARTED), around(client(0, 4, deleting=True), client(1)), NOW, OPTIONS)
    assert started(decided) == ["demo-cloud-0-5"]


def test_a_client_that_left_comes_back_after_a_while() -> None:
    gone = replace(client(0, phase="Succeeded"), finished=NOW, exit_code=0)
    assert not started(plan(job(record=STARTED), around(gone, client(1)), after(1), OPTIONS))
    assert started(plan(job(record=STARTED), around(gone, client(1)), after(6), OPTIONS)) == ["demo-cloud-0-1"]


def test_out_of_restarts_the_rest_goes_on_while_the_quorum_can_be_met() -> None:
    wanted = spec(cloud=3, backoffLimit=0)
    observed = standing(wanted, pods=(aggregator(), failed(0), client(1), client(2)))
    decided = plan(job(wanted, record=STARTED), observed, after(600), OPTIONS)
    assert not started(decided)
    assert "Failed" not in {item["type"] for item in decided.status["conditions"]}
    assert decided.status["pools"][0]["failed"] == 1


def test_too_few_clients_can_ever_be_there() -> None:
    wanted = spec(backoffLimit=0)
    # The aggregator was queried after the pods: they did not end because the training is complete.
    world = World(wanted)
    world.trains = False
    for _ in range(4):
        world.step()
        world.tick(5)
    world.fail("demo-cloud-0-0", message="RuntimeError: out of memory")
    world.run()
    assert world.condition("Failed") == "True/QuorumImpossible"
    assert "1 client can still take part, 2 are needed" in world.job.status["message"]
    assert "RuntimeError: out of memory" in world.job.status["message"]


def test_no_verdict_while_a_running_aggregator_does_not_answer() -> None:
    wanted = spec(backoffLimit=0)
    observed = standing(wanted, pods=(aggregator(), failed(0), client(1)))
    decided = plan(job(wanted, record=STARTED), observed, NOW, OPTIONS)
    assert "Failed" not in {item["type"] for item in decided.status["conditions"]}


def test_a_larger_limit_brings_a_client_back() -> None:
    record = Record({"cloud": CloudRecord(2, {0: ClientRecord(0, 1, 0)})}).dump(UID)
    observed = standing(spec(backoffLimit=0), pods=(aggregator(), failed(0), client(1)))
    assert started(plan(job(spec(backoffLimit=1), record=record), observed, after(6), OPTIONS)) == ["demo-cloud-0-1"]


def test_many_clients_are_started_in_bounded_steps() -> None:
    options = PlanOptions(cluster="c", starts_per_pass=100)
    wanted = spec(cloud=1000)
    decided = plan(job(wanted), standing(wanted), NOW, options)
    assert len(started(decided)) == 101
    (save,) = of_kind(decided, act.SaveJob)
    assert Record.load(save.record).cloud["cloud"].started == 100
    assert decided.requeue < 1


def test_a_pod_of_another_authority_is_replaced_without_counting() -> None:
    decided = plan(job(record=STARTED), around(replace(client(0), authority="b" * 16), client(1)), NOW, OPTIONS)
    assert deleted(decided) == ["demo-cloud-0-0"]


def test_why_clients_do_not_start_is_shown() -> None:
    waiting = client(0, phase="Pending", waiting="Unschedulable: 0/3 nodes are available")
    pool = plan(job(record=STARTED), around(waiting, client(1)), NOW, OPTIONS).status["pools"][0]
    assert pool["reason"] == "Unschedulable: 0/3 nodes are available"
    assert pool["queued"] == 1


@pytest.mark.parametrize(
    ("reason", "code", "said"),
    [
        ("OOMKilled", 137, "demo-cloud-0-0: OOMKilled: epoch 3"),
        # As reported by containerd if the OOM killer hit a child of the container's first process.
        ("Error", 137, "demo-cloud-0-0: killed (exit code 137), perhaps out of memory: epoch 3"),
        ("Error", 1, "demo-cloud-0-0: epoch 3"),
    ],
)
def test_a_client_that_was_killed_says_so(reason: str, code: int, said: str) -> None:
    observed = around(failed(message="epoch 3", reason=reason, exit_code=code), client(1))
    assert plan(job(record=STARTED), observed, NOW, OPTIONS).status["pools"][0]["reason"] == said


def warnings(decided: act.Plan) -> list[tuple[str, str]]:
    return [(event.reason, event.message) for event in decided.events if event.type == "Warning"]


def test_an_unknown_failure_is_described() -> None:
    observed = around(failed(reason="", exit_code=None), client(1))
    reason = plan(job(record=STARTED), observed, NOW, OPTIONS).status["pools"][0]["reason"]
    assert reason == "demo-cloud-0-0: the cluster gives no reason"


def test_the_reason_why_clients_do_not_start_is_reported_once_if_only_numbers_change() -> None:
    going = job(record=STARTED)
    first = plan(going, around(client(0, phase="Pending", waiting="Unschedulable: 0/3 nodes"), client(1)), NOW, OPTIONS)
    assert warnings(first) == [("ClientsNotRunning", "pool cloud: Unschedulable: 0/3 nodes")]
    going = replace(going, status=first.status)
    second = plan(
        going, around(client(0, phase="Pending", waiting="Unschedulable: 0/4 nodes"), client(1)), NOW, OPTIONS
    )
    assert not warnings(second)
    pull = "init container fetch: ImagePullBackOff: no"
    third = plan(going, around(client(0, phase="Pending", waiting=pull), client(1)), NOW, OPTIONS)
    assert warnings(third) == [("ClientsNotRunning", f"pool cloud: {pull}")]
    assert is_urgent(second.status, third.status)
    assert not is_urgent(first.status, second.status)


def test_a_client_that_is_created_for_long_names_what_it_mounts() -> None:
    creating = client(0, phase="Pending", placed=NOW, mounts=("Secret token", "ConfigMap site"), node="n1")
    observed = around(creating, client(1))
    soon = plan(job(record=STARTED), observed, after(59), OPTIONS)
    assert ("reason" not in soon.status["pools"][0], soon.requeue <= 1) == (True, True)
    late = plan(job(record=STARTED, status=soon.status), observed, after(60), OPTIONS)
    reason = late.status["pools"][0]["reason"]
    assert reason.startswith("ContainerCreating: for more than a minute; ")
    assert "(Secret token, ConfigMap site): `kubectl describe pod demo-cloud-0-0 --namespace team`" in reason
    assert warnings(late) == [("ClientsNotRunning", f"pool cloud: {reason}")]


def test_a_client_that_leaves_again_and_again_says_so() -> None:
    gone = replace(client(0, attempt=0, phase="Succeeded"), finished=NOW, exit_code=0)
    first = plan(job(record=STARTED), around(gone, client(1)), NOW, OPTIONS)
    assert "reason" not in first.status["pools"][0]
    again = replace(client(0, attempt=1, phase="Succeeded"), finished=NOW, exit_code=0)
    second = plan(job(record=STARTED, status=first.status), around(again, client(1)), NOW, OPTIONS)
    reason = second.status["pools"][0]["reason"]
    assert reason.startswith("demo-cloud-0-1 ended with exit code 0 before training was complete, again")
    assert warnings(second) == [("ClientsNotRunning", f"pool cloud: {reason}")]
    # The next attempt changes only the number.
    running = client(0, attempt=2)
    third = plan(job(record=STARTED, status=second.status), around(again, running, client(1)), NOW, OPTIONS)
    assert (third.status["pools"][0]["reason"], warnings(third)) == (reason, [])
