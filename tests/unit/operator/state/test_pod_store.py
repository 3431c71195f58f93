"""Tests of the pod cache with events in any order."""

from typing import Any

import pytest

from isthmus_operator.state.pod_store import PodStore, view
from tests.support.fake_cluster import UID


def pod(name: str = "demo-cloud-0-0", version: int = 5, **status: Any) -> dict[str, Any]:
    labels = {
        "isthmus.dev/job": "demo", "isthmus.dev/job-uid": UID, "isthmus.dev/role": "client",
        "isthmus.dev/pool": "cloud", "isthmus.dev/index": "0", "isthmus.dev/attempt": "0",
    }  # fmt: skip
    metadata = {
        "name": name, "namespace": "team", "uid": f"uid-{name}", "resourceVersion": str(version), "labels": labels,
        "ownerReferences": [{"apiVersion": "isthmus.dev/v1alpha1", "kind": "FederatedJob", "name": "demo", "uid": UID}],
    }  # fmt: skip
    return {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": {"phase": "Pending", **status}}


def phases(store: PodStore) -> list[str]:
    return [item.phase for item in store.of("team", UID)]


def test_an_older_version_does_not_replace_a_newer_one() -> None:
    store = PodStore()
    store.put(pod(version=7, phase="Running"))
    store.put(pod(version=5))
    assert phases(store) == ["Running"]


def test_what_was_deleted_does_not_come_back_with_a_late_answer() -> None:
    store = PodStore()
    store.drop(pod(version=9))
    store.put(pod(version=5))
    assert phases(store) == []


def test_a_list_sweeps_up_what_vanished_unseen_but_not_what_came_meanwhile() -> None:
    store = PodStore()
    store.put(pod("ghost"))
    known = [item.uid for item in store.of("team", UID)]
    store.put(pod("newcomer"))
    store.replace("team", UID, [pod("listed")], known)
    assert {item.name for item in store.of("team", UID)} == {"listed", "newcomer"}


def test_a_new_pod_of_the_same_name() -> None:
    store = PodStore()
    store.put(pod(version=7, phase="Failed"))
    successor = pod(version=2)
    successor["metadata"]["uid"] = "another"
    store.put(successor)
    assert [item.uid for item in store.of("team", UID)] == ["another"]
    store.drop(pod(version=9))
    assert [item.uid for item in store.of("team", UID)] == ["another"]


def test_a_pod_of_another_namespace_is_no_pod_of_the_job() -> None:
    store = PodStore()
    store.put(pod(version=5, phase="Running"))
    forged = pod(version=9, phase="Succeeded")
    forged["metadata"] |= {"namespace": "other", "uid": "forged"}
    store.put(forged)
    assert phases(store) == ["Running"]
    store.drop(forged)
    assert phases(store) == ["Running"]


@pytest.mark.parametrize("owners", [None, [], [{"kind": "ReplicaSet", "uid": "another"}]])
def test_a_copy_with_the_jobs_labels_is_no_pod_of_the_job(owners: list[dict[str, str]] | None) -> None:
    store = PodStore()
    copy = pod("demo-aggregator", phase="Succeeded")
    copy["metadata"]["ownerReferences"] = owners
    store.put(copy)
    store.replace("team", UID, [copy], [])
    assert (store.count(), store.of("team", UID)) == (0, ())


def test_a_pod_that_lost_its_owner_stays_known() -> None:
    store = PodStore()
    store.put(pod(version=5, phase="Running"))
    orphan = pod(version=6, phase="Failed")
    del orphan["metadata"]["ownerReferences"]
    store.put(orphan)
    assert phases(store) == ["Failed"]


def terminated(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "client", "state": {"terminated": state}, "restartCount": 0}]}


def test_a_failure_is_read_from_the_clients_own_container() -> None:
    status = terminated(exitCode=1, reason="Error", message="boom", finishedAt="2030-01-01T00:00:00Z")
    status["containerStatuses"].insert(0, {"name": "sidecar", "state": {"terminated": {"exitCode": 0}}})
    seen = view(pod(**status, phase="Failed"))
    assert (seen.exit_code, seen.message, seen.disrupted) == (1, "boom", False)
    assert seen.finished is not None


def beside(role: str, main: dict[str, Any], phase: str = "Running") -> dict[str, Any]:
    """Return a pod with a proxy that keeps running."""
    proxy = {"name": "proxy", "state": {"running": {}}}
    body = pod(phase=phase, containerStatuses=[proxy, {"name": role, "state": main}])
    body["metadata"]["labels"]["isthmus.dev/role"] = role
    return body


@pytest.mark.parametrize(
    ("role", "main", "phase"),
    [
        ("client", {"terminated": {"exitCode": 0}}, "Succeeded"),
        ("client", {"terminated": {"exitCode": 1}}, "Failed"),
        ("client", {"running": {}}, "Running"),
        ("aggregator", {"terminated": {"exitCode": 0}}, "Succeeded"),
        # It is restarted in place.
        ("aggregator", {"terminated": {"exitCode": 1}}, "Running"),
    ],
)
def test_a_pod_has_ended_with_its_program_despite_other_containers(role: str, main: dict[str, Any], phase: str) -> None:
    seen = view(beside(role, main))
    assert (seen.phase, seen.lingers) == (phase, phase != "Running")
    assert seen.active, "what runs beside it has to be stopped"


def test_a_pod_that_ended_whole_does_not_linger() -> None:
    seen = view(beside("client", {"terminated": {"exitCode": 1}}, "Failed"))
    assert (seen.phase, seen.lingers, seen.active) == ("Failed", False, False)


def test_how_what_runs_beside_it_ended_says_nothing_of_the_program() -> None:
    assert view(beside("client", {"terminated": {"exitCode": 0}}, "Failed")).phase == "Succeeded"


def test_one_container_alone_is_judged_by_kubernetes() -> None:
    # It may still turn out that the node evicted it.
    assert view(pod(**terminated(exitCode=137), phase="Running")).phase == "Running"


@pytest.mark.parametrize(
    ("status", "disrupted"),
    [
        ({"reason": "Evicted", "message": "low on memory"}, True),
        # Evicted for exceeding its own limit.
        ({"reason": "Evicted", "message": "Container client exceeded its local ephemeral storage limit"}, False),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True"}]}, True),
        # Rejected by a kubelet: no container ever started. The reasons are an open set.
        ({"reason": "TopologyAffinityError", "message": "Resources cannot be allocated"}, True),
        ({"reason": "OutOfnvidia.com/gpu", "containerStatuses": []}, True),
        ({"reason": "NodePorts"}, True),
        ({"reason": "SomeReasonOfTomorrow", "containerStatuses": [
            {"name": "client", "state": {"waiting": {"reason": "ContainerCreating"}}}]}, True),
        # The node failed or shut down.
        ({"reason": "NodeLost"}, True),
        ({"reason": "Terminated", **terminated(exitCode=137, reason="Error")}, True),
        (terminated(exitCode=137, reason="ContainerStatusUnknown"), True),
        (terminated(exitCode=255, reason="Unknown"), True),
        # Its own failure: its program, or the limit in its template.
        (terminated(exitCode=137, reason="OOMKilled"), False),
        (terminated(exitCode=1, reason="Error"), False),
        (terminated(exitCode=128, reason="StartError"), False),
        ({"reason": "DeadlineExceeded"}, False),
    ],
)  # fmt: skip
def test_ends_that_a_disruption_caused(status: dict[str, Any], disrupted: bool) -> None:
    assert view(pod(**status, phase="Failed")).disrupted is disrupted


@pytest.mark.parametrize(
    ("status", "waiting"),
    [
        ({"containerStatuses": [{"name": "client", "state": {"waiting": {"reason": "ContainerCreating"}}}]}, ""),
        ({"containerStatuses": [{"name": "client", "state": {"waiting": {
            "reason": "ImagePullBackOff", "message": "no such image"}}}]}, "ImagePullBackOff: no such image"),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]},
         "Unschedulable: 0/3"),
    ],
)  # fmt: skip
def test_why_it_waits(status: dict[str, Any], waiting: str) -> None:
    assert view(pod(**status)).waiting == waiting


def waits(reason: str, message: str = "", /, **last: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}, "lastState": {"terminated": last}}


INITIALIZING = {"name": "client", "state": {"waiting": {"reason": "PodInitializing"}}}


@pytest.mark.parametrize(
    ("init", "others", "waiting"),
    [
        ([{"name": "fetch", **waits("ImagePullBackOff", "no such image")}], [],
         "init container fetch: ImagePullBackOff: no such image"),
        ([{"name": "a", "state": {"terminated": {"exitCode": 0}}},
          {"name": "b", **waits("CrashLoopBackOff", "back-off 10s", exitCode=3, message="no disk\n")}], [],
         "init container b: CrashLoopBackOff: back-off 10s: it ended with exit code 3: no disk"),
        ([{"name": "a", "state": {"terminated": {"exitCode": 3}}}], [], "init container a failed with exit code 3"),
        ([{"name": "a", "state": {"running": {}}}], [], ""),
        ([], [{"name": "proxy", **waits("CreateContainerConfigError", 'secret "no" not found')}],
         'container proxy: CreateContainerConfigError: secret "no" not found'),
    ],
)  # fmt: skip
def test_why_what_runs_before_or_beside_it_holds_it_up(init: list[Any], others: list[Any], waiting: str) -> None:
    status = {"initContainerStatuses": init, "containerStatuses": [INITIALIZING, *others]}
    assert view(pod(**status)).waiting == waiting


def test_an_init_container_that_failed_is_why_its_pod_failed() -> None:
    ended = {"terminated": {"exitCode": 3, "reason": "Error", "message": "no disk"}}
    seen = view(
        pod(phase="Failed", initContainerStatuses=[{"name": "a", "state": ended}], containerStatuses=[INITIALIZING])
    )
    assert (seen.exit_code, seen.reason, seen.disrupted) == (3, "Error", False)
    assert seen.message == "init container a failed with exit code 3: no disk"


def test_a_pod_that_was_disrupted_says_by_what() -> None:
    target = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC", "message": "node is gone"}
    seen = view(pod(phase="Failed", conditions=[target]))
    assert (seen.reason, seen.message) == ("DeletionByPodGC", "node is gone")


def test_what_a_pod_mounts_is_kept_until_its_first_container_starts() -> None:
    placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2030-01-01T00:00:00Z"}
    body = pod(conditions=[placed], containerStatuses=[{"name": "client", **waits("ContainerCreating")}])
    body["spec"]["volumes"] = [
        {"name": "isthmus-tls", "secret": {"secretName": "demo-cloud-tls"}},
        {"name": "a", "secret": {"secretName": "token"}},
        {"name": "b", "projected": {"sources": [{"configMap": {"name": "site"}}, {"secret": {"name": "key"}}]}},
        {"name": "c", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "d", "emptyDir": {}},
    ]
    seen = view(body)
    assert seen.placed is not None
    assert seen.mounts == ("Secret token", "ConfigMap site", "Secret key", "PersistentVolumeClaim data")
    body["status"]["initContainerStatuses"] = [{"name": "i", "state": {"running": {}}}]
    assert (view(body).placed, view(body).mounts) == (None, ())


def test_foreign_labels_do_no_harm() -> None:
    body = pod()
    body["metadata"]["labels"]["isthmus.dev/index"] = "many"
    assert view(body).index == 0


def test_a_doubt_asks_for_one_list() -> None:
    store = PodStore()
    assert not store.knows(pod())
    store.put(pod())
    assert store.knows(pod())
    assert not store.take_stale(UID)
    store.mark_stale(UID)
    assert (store.take_stale(UID), store.take_stale(UID)) == (True, False)
    store.mark_stale(UID)
    store.forget_all_but({"another"})
    assert not store.take_stale(UID)


def test_pods_of_jobs_that_are_gone_are_forgotten() -> None:
    store = PodStore()
    store.put(pod())
    store.forget_all_but({UID})
    assert store.count() == 1
    store.forget_all_but(set())
    assert (store.count(), store.of("team", UID)) == (0, ())
