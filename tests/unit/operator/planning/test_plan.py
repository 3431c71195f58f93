"""Tests of the plan's actions in given states."""

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest

from isthmus_contracts.identities import FINALIZER
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator import names
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.state.job_record import AggregatorRecord, ArrayKey, ClientRecord, CloudRecord, Record
from isthmus_operator.state.observed import FederationView, Metric, ModelView, Observed, PodView, PrivacyView, Refusal
from tests.support.fake_cluster import (
    AUTHORITY,
    NOW,
    UID,
    World,
    aggregator,
    array,
    client,
    job,
    of_kind,
    plan,
    present,
    site,
    spec,
    standing,
)

LUMI = ArrayKey("lumi")

OPTIONS = PlanOptions(cluster="c")


def kinds(decided: act.Plan) -> list[str]:
    return [f"Apply {item.kind}" if isinstance(item, act.Apply) else type(item).__name__ for item in decided.actions]


def conditions(decided: act.Plan) -> dict[str, str]:
    return {item["type"]: f"{item['status']}/{item['reason']}" for item in decided.status["conditions"]}


def test_a_new_job_gets_its_finalizer_before_anything_is_made() -> None:
    decided = plan(job(spec(hpc=2), finalizers=()), Observed(sites={"site": site()}), NOW, OPTIONS)
    assert kinds(decided) == [
        "SaveJob", "Apply ConfigMap", "Apply Service", "Apply PersistentVolumeClaim", "CreateAuthority",
    ]  # fmt: skip
    assert decided.actions[0] == act.SaveJob(finalizers=(FINALIZER,))
    assert conditions(decided)["Accepted"] == "True/Valid"
    assert decided.status["phase"] == "Starting"


def test_a_job_that_has_nothing_outside_of_the_cluster_gets_no_finalizer_and_loses_an_earlier_one() -> None:
    """With a finalizer its namespace could not be deleted, since the operator's rights in it are deleted first."""
    decided = plan(job(finalizers=()), Observed(), NOW, OPTIONS)
    assert kinds(decided) == ["Apply ConfigMap", "Apply Service", "Apply PersistentVolumeClaim", "CreateAuthority"]
    old = plan(job(finalizers=("other", FINALIZER)), standing(), NOW, OPTIONS)
    assert of_kind(old, act.SaveJob)[0].finalizers == ("other",)
    # It stays while something may be at a site, even if the manifest has changed.
    there = Record(hpc={LUMI: array(attempt=2)})
    kept = plan(job(finalizers=(FINALIZER,), record=there.dump(UID)), standing(), NOW, OPTIONS)
    assert not [item for item in of_kind(kept, act.SaveJob) if item.finalizers is not None]


def test_certificates_follow_their_authority() -> None:
    decided = plan(job(), standing(certificates={}), NOW, OPTIONS)
    issued = of_kind(decided, act.IssueCertificate)
    assert {item.secret: (item.hosts[:1], item.uris, dict(item.clients)) for item in issued} == {
        "demo-aggregator-tls": (("0f9a7c1e-0000-4000-8000-000000000001.aggregator.isthmus.dev",), (), {}),
        "demo-observer-tls": ((), ("isthmus://job/0f9a7c1e-0000-4000-8000-000000000001/observer",), {}),
        "demo-cloud-tls": (
            (),
            (),
            {
                index: f"isthmus://job/0f9a7c1e-0000-4000-8000-000000000001/pool/cloud/client/{index}"
                for index in range(2)
            },
        ),
    }
    assert not of_kind(decided, act.CreatePod)


def test_no_claim_where_the_manifest_wants_none() -> None:
    wanted = spec(aggregator={"checkpoint": {"storage": "EmptyDir"}})
    assert "Apply PersistentVolumeClaim" not in kinds(plan(job(wanted), Observed(), NOW, OPTIONS))


def test_pods_are_made_once_everything_else_is_there() -> None:
    decided = plan(job(), standing(), NOW, OPTIONS)
    assert [item.name for item in of_kind(decided, act.CreatePod)] == [
        "demo-aggregator", "demo-cloud-0-0", "demo-cloud-1-0",
    ]  # fmt: skip
    # The record is written before the other actions.
    assert isinstance(decided.actions[0], act.SaveJob)
    assert Record.load(decided.actions[0].record or "").cloud["cloud"].started == 2


def test_a_running_job_asks_for_nothing() -> None:
    world = World(spec(hpc=2))
    world.trains = False
    for _ in range(10):
        world.step()
        world.tick(5)
    before = world.job.status
    decided = world.step()
    assert decided.actions == ()
    assert decided.status == before
    assert world.condition("QuorumReached") == "True/EnoughClients"


def test_what_the_aggregator_says_reaches_the_status() -> None:
    said = FederationView(
        "TRAINING",
        current_round=4,
        completed_rounds=3,
        total_rounds=5,
        connected={"cloud": 2},
        metrics=(Metric("accuracy", 0.93612, 3), Metric("loss", 1.5e-7, 3)),
        best=Metric("accuracy", 0.94, 2),
        model=ModelView("models/round-3.safetensors", 3, "ab"),
        best_model=ModelView("models/round-2.safetensors", 2, "cd"),
    )
    pods = (aggregator(), client(0), client(1))
    status = plan(job(), standing(pods=pods, federation=said), NOW, OPTIONS).status
    assert status["rounds"] == {"current": 4, "completed": 3, "total": 5}
    assert status["clients"] == {"ready": 2, "total": 2, "summary": "2/2"}
    assert status["metrics"] == [
        {"name": "accuracy", "value": "0.9361", "round": 3}, {"name": "loss", "value": "1.5e-07", "round": 3},
    ]  # fmt: skip
    assert status["bestMetric"] == {"name": "accuracy", "value": "0.94", "round": 2}
    assert status["model"]["uri"] == "pvc://team/demo-checkpoints/models/round-3.safetensors"
    assert status["bestModel"] == {
        "uri": "pvc://team/demo-checkpoints/models/round-2.safetensors", "round": 2, "sha256": "cd",
    }  # fmt: skip
    assert status["phase"] == "Running"


def test_a_running_aggregator_that_does_not_answer_keeps_its_last_status() -> None:
    pods = (aggregator(), client(0), client(1))
    said = FederationView("TRAINING", current_round=4, completed_rounds=3, connected={"cloud": 2})
    before = plan(job(), standing(pods=pods, federation=said), NOW, OPTIONS).status
    after = plan(job(status=before), standing(pods=pods, federation_error="DEADLINE_EXCEEDED: "), NOW, OPTIONS).status
    assert after["clients"]["summary"] == "2/2"
    assert after["phase"] == "Running"
    assert "does not respond" in next(c["message"] for c in after["conditions"] if c["type"] == "AggregatorReady")


def test_an_aggregator_on_a_lost_node_says_what_only_an_admin_can_do() -> None:
    pod = aggregator(deleting=True, overdue=NOW, node="n1")
    going = job(record=Record(aggregator=AggregatorRecord("uid-aggregator")).dump(UID))
    at_first = plan(going, standing(pods=(pod,)), NOW, OPTIONS)
    said = next(c["message"] for c in at_first.status["conditions"] if c["type"] == "AggregatorReady")
    assert said == "its pod is being deleted on node n1; a new one follows"
    assert at_first.requeue <= 120
    later = NOW + dt.timedelta(minutes=2)
    decided = plan(replace(going, status=at_first.status), standing(pods=(pod,)), later, OPTIONS)
    said = next(c["message"] for c in decided.status["conditions"] if c["type"] == "AggregatorReady")
    assert "a new one follows" not in said
    assert "kubectl taint node n1 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in said
    (event,) = [item for item in decided.events if "out-of-service" in item.message]
    assert (event.type, event.reason) == ("Warning", "AggregatorLost")
    # Only once, since the message stays the same.
    again = plan(replace(going, status=decided.status), standing(pods=(pod,)), later + dt.timedelta(hours=1), OPTIONS)
    assert again.events == ()


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (aggregator("Pending", waiting="ImagePullBackOff: no such image"), "AggregatorStarting"),
        (aggregator(deleting=True), "AggregatorLost"),
        (aggregator("Running", ready=False, restarts=1, last_exit_code=137), "AggregatorLost"),
        (aggregator(), "AggregatorRunning"),
    ],
)
def test_the_state_of_the_aggregator(pod: Any, reason: str) -> None:
    going = job(record=Record(aggregator=AggregatorRecord("uid-aggregator")).dump(UID))
    decided = plan(going, standing(pods=(pod, client(0), client(1))), NOW, OPTIONS)
    assert conditions(decided)["AggregatorReady"].endswith(f"/{reason}")
    assert not of_kind(decided, act.CreatePod)
    assert not of_kind(decided, act.DeletePod)


def test_the_reason_why_the_aggregator_does_not_start_is_reported_once() -> None:
    waiting = aggregator("Pending", waiting="init container fetch: ImagePullBackOff: no such image")
    observed = standing(pods=(waiting, client(0), client(1)))
    first = plan(job(), observed, NOW, OPTIONS)
    assert [event.message for event in first.events if event.type == "Warning"] == [
        "aggregator: init container fetch: ImagePullBackOff: no such image"
    ]
    assert first.status["message"] == "aggregator: init container fetch: ImagePullBackOff: no such image"
    assert not plan(job(status=first.status), observed, NOW, OPTIONS).events


def test_an_evicted_aggregator_is_replaced_after_a_moment() -> None:
    pod = aggregator("Failed", reason="Evicted", disrupted=True, finished=NOW)
    observed = standing(pods=(pod, client(0), client(1)))
    assert not of_kind(plan(job(), observed, NOW, OPTIONS), act.DeletePod)
    later = plan(job(), observed, NOW + dt.timedelta(seconds=6), OPTIONS)
    assert [item.name for item in of_kind(later, act.DeletePod)] == ["demo-aggregator"]


COMPLETE = "Complete=True/RoundsCompleted"
FAILED = "Failed=True/AggregatorFailed"


@pytest.mark.parametrize(
    ("pod", "condition"),
    [
        (aggregator("Succeeded", exit_code=0, message='{"phase":"COMPLETE","completedRounds":5}'), COMPLETE),
        (aggregator(restarts=1, last_exit_code=137, last_message='{"phase":"COMPLETE"}'), COMPLETE),
        (aggregator(restarts=1, last_exit_code=1, last_message='{"phase":"FAILED","message":"bad"}'), FAILED),
        # Stopped while its pod was deleted, exit code 0 without proof, or contradicted by its own message.
        (aggregator("Succeeded", exit_code=0, deleting=True), ""),
        (aggregator("Succeeded", exit_code=0), ""),
        (aggregator("Succeeded", exit_code=0, message='{"phase":"TRAINING"}'), ""),
        (aggregator(restarts=1, last_exit_code=1, last_message="Traceback: boom"), ""),
    ],
)
def test_the_last_words_of_the_aggregator(pod: Any, condition: str) -> None:
    decided = plan(job(), standing(pods=(pod, client(0), client(1))), NOW, OPTIONS)
    ends = {type_: value for type_, value in conditions(decided).items() if type_ in ("Complete", "Failed")}
    assert ",".join(f"{type_}={value}" for type_, value in ends.items()) == condition


@pytest.mark.parametrize(
    ("completed", "model", "phase"),
    [
        (5, {"round": 5, "sha256": "ab"}, "Complete"),
        (5, {"round": 4, "sha256": "ab"}, "Starting"),
        (4, {"round": 4, "sha256": "ab"}, "Starting"),
        (5, None, "Starting"),
    ],
)
def test_an_exit_code_0_counts_only_with_every_round_and_the_last_model_reported(
    completed: int, model: Any, phase: str
) -> None:
    known = {"rounds": {"completed": completed}, **({"model": model} if model else {})}
    pod = aggregator("Succeeded", exit_code=0, finished=NOW)
    decided = plan(job(status=known), standing(pods=(pod, client(0), client(1))), NOW, OPTIONS)
    assert decided.status["phase"] == phase


def test_an_aggregator_that_ends_with_0_and_no_proof_is_replaced_and_then_fails_the_job() -> None:
    going, now = job(), NOW
    for number in range(1, OPTIONS.aggregator_crashes + 1):
        ended = aggregator("Succeeded", exit_code=0, uid=f"uid-{number}", finished=now)
        observed = standing(pods=(ended, client(0), client(1)))
        decided = plan(going, observed, now, OPTIONS)
        record = next((item.record for item in of_kind(decided, act.SaveJob)), going.record)
        going = job(record=record, status=decided.status)
        if number == OPTIONS.aggregator_crashes:
            break
        assert conditions(decided)["AggregatorReady"] == "False/AggregatorLost"
        assert "spec.aggregator runs python -m isthmus.aggregator" in decided.status["message"]
        # Observed twice, it counts once; the pause before the next one grows.
        assert Record.load(record or "").aggregator.crashes == number
        wait = dt.timedelta(seconds=min(5 * 2 ** (number - 1), 300))
        assert not of_kind(plan(going, observed, now + wait / 2, OPTIONS), act.SaveJob)
        assert not of_kind(plan(going, observed, now + wait / 2, OPTIONS), act.DeletePod)
        now += wait
        assert [item.uid for item in of_kind(plan(going, observed, now, OPTIONS), act.DeletePod)] == [f"uid-{number}"]
    assert conditions(decided)["Failed"] == "True/AggregatorFailed"
    assert decided.status["message"].startswith(
        "the aggregator ended 8 times without completing a round; it ended with exit code 0 and did not report"
    )


def test_a_target_that_is_reached_completes_the_job_early() -> None:
    wanted = spec(objective={"metric": "accuracy", "target": "0.9"})
    said = FederationView("COMPLETE", completed_rounds=2, current_round=2, total_rounds=5)
    decided = plan(job(wanted), standing(wanted, pods=(aggregator(),), federation=said), NOW, PlanOptions())
    (complete,) = [item for item in decided.status["conditions"] if item["type"] == "Complete"]
    assert (complete["status"], complete["reason"]) == ("True", "TargetReached")
    assert decided.status["message"] == "accuracy reached 0.9 after 2 rounds"


@pytest.mark.parametrize(
    ("completed", "spent", "reason", "message"),
    [
        (2, True, "PrivacyBudgetSpent",
         "epsilon is 7.513 after 2 of 5 rounds, and another would pass maxEpsilon 8"),
        (2, False, "RoundsCompleted", "2 rounds completed"),
        (5, True, "RoundsCompleted", "5 rounds completed"),
    ],
)  # fmt: skip
def test_a_privacy_budget_that_is_spent_completes_the_job_early(
    completed: int, spent: bool, reason: str, message: str
) -> None:
    private = {"clipNorm": "1", "noiseMultiplier": "1", "maxEpsilon": "8"}
    wanted = spec(privacy={"differentialPrivacy": private})
    privacy = PrivacyView(epsilon=7.51201, delta=1e-5, rounds=completed, spent=spent)
    said = FederationView("COMPLETE", completed_rounds=completed, total_rounds=5, privacy=privacy)
    decided = plan(job(wanted), standing(wanted, pods=(aggregator(),), federation=said), NOW, PlanOptions())
    (complete,) = [item for item in decided.status["conditions"] if item["type"] == "Complete"]
    assert (complete["status"], complete["reason"], decided.status["message"]) == ("True", reason, message)
    assert decided.status["privacy"] == {"epsilon": "7.513", "delta": "1e-05", "rounds": completed}


def test_an_aggregator_that_keeps_crashing_fails_the_job_unless_it_gets_on() -> None:
    crashed = aggregator(restarts=8, last_exit_code=139, last_message="Fatal Python error\nSegmentation fault")
    decided = plan(job(), standing(pods=(crashed,)), NOW, OPTIONS)
    assert conditions(decided)["Failed"] == "True/AggregatorFailed"
    assert "Segmentation fault" in decided.status["message"]
    # The same number of crashes, all but the last before a round was completed.
    record = Record()
    record.aggregator.pod, record.aggregator.restarts, record.aggregator.crashes = "uid-aggregator", 7, 7
    going = job(record=record.dump(UID), status={"rounds": {"completed": 3}})
    assert "Failed" not in conditions(plan(going, standing(pods=(crashed,)), NOW, OPTIONS))


def test_an_invalid_manifest_is_rejected_and_nothing_made() -> None:
    decided = plan(job(spec(rounds=0)), Observed(), NOW, OPTIONS)
    assert decided.actions == ()
    assert conditions(decided) == {
        "Accepted": "False/InvalidSpec",
        "Ready": "False/InvalidSpec",
        "Reconciling": "False/InvalidSpec",
        "Stalled": "True/InvalidSpec",
    }
    assert decided.status["phase"] == "Rejected"
    assert decided.status["message"] == "spec.rounds: must be at least 1, not 0"
    assert [event.reason for event in decided.events] == ["InvalidSpec"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (spec(pools=[{"name": "a", "cloud": {"template": {"spec": {"containers": "x"}}}}]),
         "spec.pools[0].cloud.template.spec.containers: must be a list"),
        (spec(aggregator={"template": {"spec": {"restartPolicy": "Always"}}}),
         "spec.aggregator.template.spec.restartPolicy: is set by Isthmus"),
        (spec(pools=[{"name": "observer", "replicas": 2, "cloud": {}}]), "spec.pools[0].name: 'observer' is reserved"),
        (spec(pools=[{"name": "a", "replicas": 2, "cloud": {"template": {"spec": {"containers": [
            {"name": "client", "env": [{"name": "ISTHMUS_INDEX", "value": "7"}]}]}}}}]),
         "spec.pools[0].cloud.template.spec.containers[0].env[0].name: names that begin with ISTHMUS_ are reserved"),
    ],
)  # fmt: skip
def test_templates_are_checked_before_anything_is_made(wanted: dict[str, Any], message: str) -> None:
    decided = plan(job(wanted), Observed(), NOW, OPTIONS)
    assert decided.actions == ()
    assert decided.status["message"] == message


def test_a_name_that_is_too_long_is_rejected() -> None:
    decided = plan(job(name="a" * 51), Observed(), NOW, OPTIONS)
    assert conditions(decided)["Accepted"] == "False/InvalidSpec"


@pytest.mark.parametrize(
    ("sites", "reason"), [({}, "SiteNotFound"), ({"site": site(namespaces=("others",))}, "SiteNotAllowed")]
)
def test_a_site_that_cannot_be_used_keeps_a_job_out(sites: dict[str, Any], reason: str) -> None:
    decided = plan(job(spec(hpc=2)), Observed(sites=sites), NOW, OPTIONS)
    assert decided.actions == ()
    assert conditions(decided)["Accepted"] == f"False/{reason}"
    # Once it may be used, the job continues.
    again = plan(job(spec(hpc=2), status=decided.status), Observed(sites={"site": site()}), NOW, OPTIONS)
    assert conditions(again)["Accepted"] == "True/Valid"


def test_a_site_that_goes_later_does_not_end_the_job() -> None:
    decided = plan(job(spec(hpc=2)), standing(spec(hpc=2), sites={}), NOW, OPTIONS)
    assert conditions(decided)["Accepted"] == "True/Valid"
    assert next(p["reason"] for p in decided.status["pools"] if p["name"] == "lumi") == "SiteNotFound: HPCSite site"
    assert not of_kind(decided, act.EnsurePool)


def test_changes_that_need_a_new_job_are_reported_and_ignored() -> None:
    changed = job(spec(cloud=5, rounds=99, backoffLimit=0), generation=2)
    observed = standing(pods=(aggregator(), client(0), client(1)))
    before = plan(job(), observed, NOW, OPTIONS).status
    decided = plan(replace(changed, status=before), observed, NOW, OPTIONS)
    assert not of_kind(decided, act.CreatePod)
    accepted = next(item for item in decided.status["conditions"] if item["type"] == "Accepted")
    assert accepted["message"] == "changes of spec.rounds, spec.pools are ignored: they need a new job"
    assert [event.message for event in decided.events] == [accepted["message"]]
    assert not plan(replace(changed, status=decided.status), observed, NOW, OPTIONS).events


def test_names_that_belong_to_something_else_are_left_alone() -> None:
    decided = plan(job(), standing(present=frozenset(), conflicting=("Secret/demo-ca",)), NOW, OPTIONS)
    assert decided.actions == ()
    assert decided.status["message"] == "aggregator: waits for object names that are taken: Secret/demo-ca"


def test_refusals_of_the_api_server_are_reported_and_retried_later() -> None:
    refusals = {"Pod/demo-cloud-1-0": Refusal("exceeded quota: pods", NOW + dt.timedelta(seconds=10))}
    observed = standing(pods=(aggregator(), client(0)), refusals=refusals)
    record = Record.load('{"cloud":{"cloud":{"started":2,"clients":{}}}}')
    decided = plan(job(record=record.dump(UID)), observed, NOW, OPTIONS)
    assert not of_kind(decided, act.CreatePod)
    reason = decided.status["pools"][0]["reason"]
    assert reason == "the API server refused demo-cloud-1-0: exceeded quota: pods"
    # The same name is used again, since it never existed.
    later = plan(job(record=record.dump(UID)), observed, NOW + dt.timedelta(seconds=11), OPTIONS)
    assert [item.name for item in of_kind(later, act.CreatePod)] == ["demo-cloud-1-0"]


def test_a_refused_volume_is_reported_too() -> None:
    refusals = {"PersistentVolumeClaim/demo-checkpoints": Refusal("exceeded quota", NOW + dt.timedelta(seconds=10))}
    decided = plan(
        job(), standing(present=present(parse_spec(spec())) - set(refusals), refusals=refusals), NOW, OPTIONS
    )
    assert decided.actions == ()
    assert "refused PersistentVolumeClaim/demo-checkpoints: exceeded quota" in decided.status["message"]


def test_a_suspended_job_stops_and_comes_back_where_it_was() -> None:
    world = World(spec(hpc=2, rounds=50))
    for _ in range(12):
        world.step()
        world.tick(5)
    assert world.rounds > 1
    world.job = replace(world.job, spec=spec(hpc=2, rounds=50, suspend=True))
    world.run()
    assert world.condition("Suspended") == "True/SuspendedByUser"
    assert not [pod for pod in world.observed.pods if not pod.ended]
    assert [view.phase for view in world.pools.values()] == ["CANCELLED"]
    assert "startTime" not in world.job.status
    done = world.rounds
    world.job = replace(world.job, spec=spec(hpc=2, rounds=50))
    for _ in range(6):
        world.step()
        world.tick(5)
    assert world.condition("Suspended") == "False/NotSuspended"
    assert world.rounds > done
    assert "AggregatorLost" not in {event.reason for event in world.events}
    # The attempt numbers rise, so the new starts fence the old ones.
    assert {pod.name for pod in world.observed.pods} >= {"demo-cloud-0-1", "demo-cloud-1-1"}
    assert len(world.pools) == 2


def test_the_deadline() -> None:
    world = World(spec(activeDeadlineSeconds=60))
    world.trains = False
    world.run()
    assert world.condition("Failed") == "True/DeadlineExceeded"
    assert not [pod for pod in world.observed.pods if not pod.ended]
    assert "PersistentVolumeClaim/demo-checkpoints" in world.observed.present


def test_a_finished_job_is_deleted_when_its_time_is_over() -> None:
    world = World(spec(ttlSecondsAfterFinished=120))
    world.run(seconds=10)
    assert world.gone


def test_a_complete_job_stops_what_lives_on_beside_its_programs() -> None:
    said = '{"phase":"COMPLETE","completedRounds":5}'
    pods = (
        aggregator("Succeeded", exit_code=0, message=said, lingers=True),
        client(0, phase="Succeeded", lingers=True),
    )
    first = plan(job(), standing(pods=pods), NOW, OPTIONS)
    assert conditions(first)["Complete"] == "True/RoundsCompleted"
    later = plan(job(status=first.status), standing(pods=pods), NOW + dt.timedelta(seconds=60), OPTIONS)
    assert [item.name for item in of_kind(later, act.DeletePod)] == ["demo-aggregator", "demo-cloud-0-0"]


def test_a_complete_job_keeps_the_pods_that_ended_and_stops_the_rest_after_a_grace() -> None:
    status = {
        "conditions": [{"type": "Complete", "status": "True", "reason": "RoundsCompleted"}],
        "completionTime": "2030-01-01T00:00:00Z",
    }
    observed = standing(pods=(aggregator("Succeeded"), client(0, phase="Succeeded"), client(1)))
    assert not plan(job(status=status), observed, NOW + dt.timedelta(seconds=5), OPTIONS).actions
    later = plan(job(status=status), observed, NOW + dt.timedelta(seconds=31), OPTIONS)
    assert [item.name for item in of_kind(later, act.DeletePod)] == ["demo-cloud-1-0"]


def test_a_damaged_record_does_not_lose_the_pool_at_the_site() -> None:
    status = {"pools": [{"name": "lumi", "attempt": 3}]}
    broken = job(spec(hpc=2), record="{oops", status=status, deleted=NOW)
    decided = plan(broken, standing(spec(hpc=2)), NOW, OPTIONS)
    (cancel,) = of_kind(decided, act.CancelPool)
    assert cancel.site == "site"
    assert not [item for item in of_kind(decided, act.SaveJob) if item.finalizers is not None]


def with_evaluators(count: int) -> dict[str, Any]:
    wanted = spec(backoffLimit=0)
    return {**wanted, "pools": [*wanted["pools"], {"name": "ev", "replicas": count, "role": "Evaluate", "cloud": {}}]}


def evaluator(index: int) -> PodView:
    name = names.client(job(), "ev", index, 0)
    return PodView(name, name, names.ROLE_CLIENT, "ev", index, 0, "Running", ready=True, authority=AUTHORITY)


def test_clients_that_only_evaluate_make_no_quorum() -> None:
    wanted = with_evaluators(3)
    said = FederationView("WAITING", message="0 of 2 needed clients are connected", connected={"cloud": 0, "ev": 3})
    pods = (aggregator(), *(evaluator(index) for index in range(3)))
    waits = plan(job(wanted), standing(wanted, pods=pods, federation=said), NOW, OPTIONS)
    quorum = next(item for item in waits.status["conditions"] if item["type"] == "QuorumReached")
    assert (quorum["status"], quorum["message"]) == ("False", "0 training clients connected, 2 needed")
    assert waits.status["clients"]["summary"] == "3/5"
    # They do not keep a job running whose trainers have no restarts left.
    lost = Record(cloud={"cloud": CloudRecord(2, {i: ClientRecord(0, 1, 0) for i in (0, 1)}), "ev": CloudRecord(3)})
    ended = plan(job(wanted, record=lost.dump(UID)), standing(wanted, pods=pods, federation=said), NOW, OPTIONS)
    assert conditions(ended)["Failed"] == "True/QuorumImpossible"
    assert ended.status["message"].startswith("0 training clients can still take part, 2 are needed")


OTHER_UID = "0f9a7c1e-0000-4000-8000-00000000ffff"


def test_a_record_copied_with_a_manifest_does_not_affect_the_new_job() -> None:
    lost = Record(cloud={"cloud": CloudRecord(2, {i: ClientRecord(3, 4, 3) for i in (0, 1)})})
    assert conditions(plan(job(record=lost.dump(UID)), standing(), NOW, OPTIONS))["Failed"] == "True/QuorumImpossible"
    copied = job(record=lost.dump(OTHER_UID))
    decided = plan(copied, standing(), NOW, OPTIONS)
    assert {item.name for item in of_kind(decided, act.CreatePod)} >= {"demo-cloud-0-0", "demo-cloud-1-0"}
    # From then on the record is this job's own; an empty one is not written.
    saved = of_kind(decided, act.SaveJob)[0].record
    assert Record.load(saved, UID).cloud["cloud"].started == 2
    assert not of_kind(plan(copied, standing(certificates={}), NOW, OPTIONS), act.SaveJob)
    # A record without a uid may be any job's, and is ignored as well.
    assert "Failed" not in conditions(plan(job(record=lost.dump()), standing(), NOW, OPTIONS))
    # A record that does not change is not written again.
    unchanged = job(record=Record(aggregator=AggregatorRecord(round=1)).dump(UID))
    assert not of_kind(plan(unchanged, standing(certificates={}), NOW, OPTIONS), act.SaveJob)


def test_a_copied_record_cancels_nothing_when_the_new_job_goes() -> None:
    there = Record(hpc={LUMI: array(attempt=2, authority="b" * 16)})
    decided = plan(job(spec(hpc=2), record=there.dump(OTHER_UID), deleted=NOW), standing(spec(hpc=2)), NOW, OPTIONS)
    assert decided.actions == (act.SaveJob(finalizers=()),)


def test_a_lost_volume_is_reported_and_its_rounds_no_longer_count() -> None:
    before = {"rounds": {"current": 4, "completed": 3, "total": 5}, "model": {"uri": "x", "round": 3, "sha256": "a"}}
    parsed = parse_spec(spec())
    gone = standing(present=present(parsed) - {"PersistentVolumeClaim/demo-checkpoints"})
    decided = plan(job(status=before), gone, NOW, OPTIONS)
    assert "Apply PersistentVolumeClaim" in kinds(decided)
    (said,) = [event.message for event in decided.events if event.type == "Warning"]
    assert said.startswith("the claim demo-checkpoints is gone, and 3 completed rounds with it")
    assert decided.status["rounds"]["completed"] == 0
    assert "model" not in decided.status
    # For a new job it does not exist yet.
    assert not [event for event in plan(job(), gone, NOW, OPTIONS).events if event.type == "Warning"]
