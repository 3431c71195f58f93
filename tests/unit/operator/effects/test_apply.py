"""Tests of actions that the API server partly fails."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from isthmus_contracts import identities as ids
from isthmus_operator.effects.apply import Effects
from isthmus_operator.effects.bridge import Bridges
from isthmus_operator.effects.kube import Kube, KubeError
from isthmus_operator.effects.site_holds import SiteHolds
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.state.job_cache import JobCache
from isthmus_operator.state.job_store import JobStore, SiteStore
from isthmus_operator.state.pod_store import PodStore
from tests.support.fake_cluster import NOW, UID, aggregator, client, job, of_kind, plan, standing

WEBHOOK_DOWN = KubeError(
    500, 'Internal error occurred: failed calling webhook "pods.example": refused', "InternalError"
)


class FakeKube:
    """A fake API server that fails requests for objects of some names."""

    def __init__(self, failures: Mapping[str, KubeError]) -> None:
        self.failures = failures
        self.done: list[str] = []

    async def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._do("create", body["metadata"]["name"], body)

    async def apply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._do("apply", body["metadata"]["name"], body)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        self._do("delete", name, {})

    def _do(self, verb: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if name in self.failures:
            raise self.failures[name]
        self.done.append(f"{verb} {name}")
        return {**body, "metadata": {**body.get("metadata", {}), "uid": f"uid-{name}"}}


class FakeBridges:
    """A fake site that accepts every request."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    async def cancel(self, site: str, key: str, grace: int, reason: str) -> None:
        self.cancelled.append(key)


def pod(name: str) -> act.CreatePod:
    labels = {ids.LABEL_JOB_UID: UID, ids.LABEL_ROLE: "client", ids.LABEL_POOL: "cloud"}
    owner = {"kind": "FederatedJob", "uid": UID}
    metadata = {"name": name, "namespace": "team", "labels": labels, "ownerReferences": [owner]}
    return act.CreatePod({"kind": "Pod", "metadata": metadata})


def made(kube: Any, bridges: Any) -> Effects:
    """Effects on a fake API server and fake sites."""
    jobs = JobStore()
    holds = SiteHolds(cast(Kube, kube), jobs, SiteStore())
    return Effects(cast(Kube, kube), jobs, PodStore(), cast(Bridges, bridges), holds)


ACTIONS = (
    act.Apply({"kind": "Service", "metadata": {"name": "demo-aggregator", "namespace": "team"}}),
    pod("demo-cloud-0-0"),
    pod("demo-cloud-1-0"),
    act.CancelPool("lumi", "site", "key", "over"),
)


async def perform(failures: Mapping[str, KubeError], *actions: act.Action) -> tuple[FakeKube, FakeBridges, JobCache]:
    kube, bridges, cache = FakeKube(failures), FakeBridges(), JobCache(UID)
    effects = made(kube, bridges)
    try:
        await effects.perform(job(), cache, actions or ACTIONS, NOW)
    except KubeError as error:
        error.add_note(f"{kube.done} {bridges.cancelled}")
        raise
    return kube, bridges, cache


@pytest.mark.parametrize(
    "error", [WEBHOOK_DOWN, KubeError(504, "context deadline exceeded"), KubeError(403, "exceeded quota", "Forbidden")]
)
async def test_a_failure_of_one_request_is_remembered_and_the_rest_is_done(error: KubeError) -> None:
    kube, bridges, cache = await perform({"demo-aggregator": error, "demo-cloud-0-0": error})
    assert (kube.done, bridges.cancelled) == (["create demo-cloud-1-0"], ["key"])
    refused = {key: refusal.message for key, refusal in cache.refusals.items()}
    assert refused == {"Service/demo-aggregator": str(error), "Pod/demo-cloud-0-0": str(error)}


async def test_what_is_remembered_reaches_the_status_and_an_event() -> None:
    _, _, cache = await perform({"demo-cloud-0-0": WEBHOOK_DOWN})
    observed = standing(pods=(aggregator(), client(1)), refusals=dict(cache.refusals))
    decided = plan(job(), observed, NOW, PlanOptions(cluster="c"))
    said = f"the API server refused demo-cloud-0-0: {WEBHOOK_DOWN}"
    assert decided.status["pools"][0]["reason"] == said
    assert [event.message for event in decided.events if event.type == "Warning"] == [f"pool cloud: {said}"]


async def test_the_same_for_the_aggregators_pod() -> None:
    (made,) = [
        item
        for item in of_kind(plan(job(), standing(), NOW, PlanOptions(cluster="c")), act.CreatePod)
        if item.name == "demo-aggregator"
    ]
    _, _, cache = await perform({"demo-aggregator": WEBHOOK_DOWN}, made)
    observed = replace(standing(pods=(client(0), client(1))), refusals=dict(cache.refusals))
    decided = plan(job(), observed, NOW, PlanOptions(cluster="c"))
    said = f"aggregator: the API server refused its pod: {WEBHOOK_DOWN}"
    assert decided.status["message"] == said
    assert [event.message for event in decided.events if event.type == "Warning"] == [said]


async def test_a_deletion_that_fails_is_raised_once_the_rest_is_done() -> None:
    deletion = act.DeletePod("demo-cloud-0-0", "uid")
    with pytest.raises(KubeError) as raised:
        await perform({"demo-cloud-0-0": WEBHOOK_DOWN}, deletion, *ACTIONS[2:])
    assert raised.value is WEBHOOK_DOWN
    assert raised.value.__notes__ == ["['create demo-cloud-1-0'] ['key']"]


async def test_a_pod_that_a_going_namespace_does_not_let_be_deleted_keeps_no_pool_from_being_cancelled() -> None:
    kube, bridges = FakeKube({"demo-cloud-0-0": KubeError(403, "pods is forbidden")}), FakeBridges()
    effects = made(kube, bridges)
    steps = (act.DeletePod("demo-cloud-0-0", "uid"), ACTIONS[3])
    with pytest.raises(KubeError):
        await effects.perform(job(), JobCache(UID), steps, NOW)
    await effects.perform(job(deleted=NOW), JobCache(UID), steps, NOW)
    assert bridges.cancelled == ["key"]


@pytest.mark.parametrize("code", [0, 429])
async def test_an_api_server_that_does_not_answer_is_asked_no_further(code: int) -> None:
    error = KubeError(code, "no answer")
    with pytest.raises(KubeError) as raised:
        await perform({"demo-aggregator": error})
    assert raised.value.__notes__ == ["[] []"]


class Recorder:
    """A fake API server with events, which can be removed."""

    def __init__(self) -> None:
        self.created = 0
        self.patched: list[tuple[str, Mapping[str, Any]]] = []
        self.gone = False

    async def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.created += 1
        return {"metadata": {"name": f"demo.{self.created}"}}

    async def patch(
        self, kind: str, namespace: str, name: str, body: Mapping[str, Any], sub: str = ""
    ) -> dict[str, Any]:
        if self.gone:
            raise KubeError(404, "not found")
        self.patched.append((f"{kind} {name} {sub}".strip(), body))
        return {
            "metadata": {"name": name, "namespace": "team", "uid": UID, "creationTimestamp": "2030-01-01T00:00:00Z"}
        }


async def test_events_of_the_same_words_are_counted_up() -> None:
    kube, cache = Recorder(), JobCache(UID)
    effects = made(kube, FakeBridges())
    for _ in range(3):
        await effects.emit(job(), cache, act.Emit("Normal", "Valid", "it is"), NOW)
    await effects.emit(job(), cache, act.Emit("Normal", "Valid", "it is not"), NOW)
    assert (kube.created, [(name, body["count"]) for name, body in kube.patched]) == (
        2, [("Event demo.1", 2), ("Event demo.1", 3)],
    )  # fmt: skip
    kube.gone = True
    await effects.emit(job(), cache, act.Emit("Normal", "Valid", "it is"), NOW)
    assert kube.created == 3


async def test_a_status_is_written_to_this_very_job() -> None:
    kube = Recorder()
    effects = made(kube, FakeBridges())
    await effects.write_status(job(), {"phase": "Running"})
    expected = {"metadata": {"uid": UID}, "status": {"phase": "Running"}}
    assert kube.patched == [("FederatedJob demo status", expected)]
