"""Pods of jobs with a queue, as the webhook and the controller of Kueue's plain pods want them.

The rules are those of pkg/controller/jobs/pod in kubernetes-sigs/kueue (pod_webhook.go, pod_controller.go).
"""

import copy
import datetime as dt
import re
from dataclasses import replace
from typing import Any

import pytest

from isthmus_contracts.manifests.manifest import MAX_JOB_NAME
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.render import kueue
from isthmus_operator.state.observed import Job, PodView
from tests.support.fake_cluster import NOW, UID, aggregator, client, job, of_kind, plan, spec, standing

QUEUE, GROUP = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/pod-group-name"
COUNT = "kueue.x-k8s.io/pod-group-total-count"
OPTIONS = PlanOptions(starts_per_pass=1000)


def queued(wanted: dict[str, Any]) -> Job:
    return replace(job(wanted), queue="team-a")


def pods(wanted: dict[str, Any], *, labelled: bool = True) -> list[dict[str, Any]]:
    """The pods of a job's first pass, as Kueue's webhook returns them."""
    one = queued(wanted) if labelled else job(wanted)
    decided = plan(one, standing(wanted), NOW, OPTIONS)
    return [admitted(item.body) for item in of_kind(decided, act.CreatePod)]


def admitted(pod: Any) -> dict[str, Any]:
    """PodWebhook.ValidateCreate and PodWebhook.Default."""
    pod = copy.deepcopy(dict(pod))
    labels, annotations = pod["metadata"]["labels"], pod["metadata"]["annotations"]
    assert (GROUP in labels) == (COUNT in annotations), "both or none of them"
    if GROUP in labels:
        assert len(labels[GROUP]) <= 63
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", labels[GROUP])
        assert int(annotations[COUNT]) > 0
    assert labels.get("kueue.x-k8s.io/managed", "true") == "true"
    assert "schedulingGates" not in pod["spec"], "Kueue sets its own"
    if QUEUE in labels:
        pod["spec"]["schedulingGates"] = [{"name": "kueue.x-k8s.io/admission"}]
        labels["kueue.x-k8s.io/managed"] = "true"
        pod["metadata"]["finalizers"] = ["kueue.x-k8s.io/managed"]
    return pod


def composed(found: list[dict[str, Any]]) -> list[str]:
    """Pod.validatePodGroupMetadata, of the pods of one group; the names of the group's pods."""
    group = [pod for pod in found if GROUP in pod["metadata"]["labels"]]
    assert len({pod["metadata"]["labels"][GROUP] for pod in group}) == 1
    assert len({pod["metadata"]["labels"][QUEUE] for pod in group}) == 1
    (count,) = {pod["metadata"]["annotations"][COUNT] for pod in group}
    assert int(count) == len(group), "fewer runnable pods than expected, or excess pods"
    return [pod["metadata"]["name"] for pod in group]


def pools(**sizes: int) -> list[dict[str, Any]]:
    return [{"name": name, "replicas": count, "cloud": {}} for name, count in sizes.items()]


def test_the_clients_of_the_quorum_are_one_group_and_the_others_are_on_their_own() -> None:
    found = pods(spec(cloud=0, pools=pools(a=2, b=3), selection={"minClients": 4}))
    assert composed(found) == ["demo-a-0-0", "demo-a-1-0", "demo-b-0-0", "demo-b-1-0"]
    assert all(pod["metadata"]["labels"][QUEUE] == "team-a" for pod in found)
    assert {"demo-aggregator", "demo-b-2-0"} <= {pod["metadata"]["name"] for pod in found}
    assert found[1]["metadata"]["labels"][GROUP] == f"demo-{UID[:8]}"


def test_a_round_needs_its_updates_too_and_hpc_clients_come_from_elsewhere() -> None:
    wanted = spec(cloud=3, hpc=2, selection={"minClients": 2}, stragglers={"minUpdates": 4})
    assert composed(pods(wanted)) == ["demo-cloud-0-0", "demo-cloud-1-0"]
    enough = spec(cloud=3, hpc=4, selection={"minClients": 2}, stragglers={"minUpdates": 4})
    assert not [pod for pod in pods(enough) if GROUP in pod["metadata"]["labels"]]


def test_those_that_only_evaluate_and_those_of_bursts_are_not_in_the_group() -> None:
    wanted = spec(
        cloud=0,
        pools=[
            {"name": "ev", "role": "Evaluate", "replicas": 2, "cloud": {}},
            {"name": "train", "replicas": 3, "cloud": {}},
        ],
        selection={"minClients": 2},
    )
    assert composed(pods(wanted)) == ["demo-train-0-0", "demo-train-1-0"]


def test_a_job_without_a_queue_is_not_touched() -> None:
    keys = {key for pod in pods(spec(cloud=3), labelled=False) for key in pod["metadata"]["labels"]}
    assert not [key for key in keys if "kueue" in key]


def test_the_name_of_the_group_is_a_label_and_another_one_for_a_later_job() -> None:
    longest = replace(job(), name="j" * MAX_JOB_NAME)
    assert len(kueue.group_name(longest)) <= 63
    assert kueue.group_name(replace(longest, uid="11111111-0")) != kueue.group_name(longest)


def started(*seen: PodView, wanted: dict[str, Any], now: dt.datetime = NOW) -> list[dict[str, Any]]:
    decided = plan(queued(wanted), standing(wanted, pods=(aggregator(), *seen)), now, OPTIONS)
    return [admitted(item.body) for item in of_kind(decided, act.CreatePod)]


SPEC = spec(cloud=2, selection={"minClients": 2})


@pytest.mark.parametrize(("phase", "grouped"), [("Failed", True), ("Succeeded", False)])
def test_the_group_never_exceeds_its_size_by_replacements(phase: str, grouped: bool) -> None:
    """Kueue counts pods that succeeded, and not those that failed."""
    ended = client(0, phase=phase, finished=NOW - dt.timedelta(hours=1), exit_code=0 if phase == "Succeeded" else 1)
    (pod,) = started(ended, client(1), wanted=SPEC)
    assert pod["metadata"]["name"] == "demo-cloud-0-1"
    assert (GROUP in pod["metadata"]["labels"]) is grouped


def test_a_pod_that_is_being_deleted_keeps_its_place_until_it_has_ended() -> None:
    overdue = NOW + dt.timedelta(seconds=30)
    leaving = client(0, deleting=True, node="n", overdue=overdue)
    assert started(leaving, client(1), wanted=SPEC) == []
    (pod,) = started(replace(leaving, phase="Failed"), client(1), wanted=SPEC)
    assert GROUP in pod["metadata"]["labels"]
    # One that never had a node counts no more, and one on a lost node does not go by itself.
    assert len(started(replace(leaving, node=""), client(1), wanted=SPEC)) == 1
    assert len(started(leaving, client(1), wanted=SPEC, now=overdue + dt.timedelta(seconds=61))) == 1
    unqueued = plan(job(SPEC), standing(SPEC, pods=(aggregator(), leaving, client(1))), NOW, OPTIONS)
    assert len(of_kind(unqueued, act.CreatePod)) == 1


def test_a_pod_that_is_not_admitted_says_what_it_waits_for() -> None:
    gated = client(
        0, phase="Pending", waiting="SchedulingGated: Scheduling is blocked due to non-empty scheduling gates"
    )
    decided = plan(queued(SPEC), standing(SPEC, pods=(aggregator(), gated, client(1))), NOW, OPTIONS)
    (pool,) = decided.status["pools"]
    assert pool["reason"] == (
        "SchedulingGated: waits for Kueue to admit it to the queue team-a: `kubectl get workloads --namespace team`"
        " shows which wait"
    )
    assert pool["queued"] == 1
