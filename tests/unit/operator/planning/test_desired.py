"""Tests of the restoration of edited and deleted objects, and that nothing else is written."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.effects import dependents
from isthmus_operator.effects.apply import Effects
from isthmus_operator.effects.bridge import Bridges
from isthmus_operator.effects.kube import Kube, KubeError
from isthmus_operator.effects.signing_root import SigningRoot
from isthmus_operator.effects.site_holds import SiteHolds
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.planning.desired import desired, unmet
from isthmus_operator.render.pod import metadata
from isthmus_operator.state.job_cache import JobCache
from isthmus_operator.state.job_store import JobStore, SiteStore
from isthmus_operator.state.observed import Observed
from isthmus_operator.state.pod_store import PodStore
from tests.support.fake_cluster import NOW, UID, job, of_kind, plan, site, spec, standing

SPEC = spec(
    aggregator={
        "disruptionBudget": "Protect",
        "expose": {"type": "LoadBalancer", "annotations": {"lb": "internal"}, "ipFamilies": ["IPv6"]},
    }
)
NO_ROOT = SigningRoot(cast(Kube, None), "cluster", "")
LIMITS = PlanOptions(network_policies=True, namespace="isthmus-system")


def as_stored() -> dict[str, dict[str, Any]]:
    """Return every object of a job as the API server reports it, with the additions of controllers."""
    found: dict[str, dict[str, Any]] = {}
    for item in desired(job(SPEC), parse_spec(SPEC), LIMITS, {"site": site()}):
        body = copy.deepcopy(dict(item.action.body)) if isinstance(item.action, act.Apply) else {}
        body.setdefault("metadata", metadata(job(SPEC), item.name))
        body["metadata"]["labels"]["mesh.example/injected"] = "true"
        body["metadata"]["annotations"] = {**body["metadata"].get("annotations", {}), "cloud.example/id": "7"}
        found[item.key] = body
    service = found["Service/demo-aggregator"]["spec"]
    service |= {"clusterIP": "10.96.0.7", "sessionAffinity": "None", "ipFamilyPolicy": "PreferDualStack"}
    service["ports"][0]["nodePort"] = 31234
    service["ipFamilies"].append("IPv4")
    found["NetworkPolicy/demo-clients"]["spec"].pop("ingress")  # an empty list is omitted
    found["PersistentVolumeClaim/demo-checkpoints"]["spec"] |= {
        "volumeName": "pv-1", "storageClassName": "standard", "resources": {"requests": {"storage": "99Gi"}},
    }  # fmt: skip
    return found


def around(**changes: Any) -> Observed:
    there = as_stored()
    return replace(standing(SPEC), **{"present": frozenset(there), "live": there, **changes})


def mends(seen: Observed) -> dict[str, act.Mend]:
    decided = plan(job(SPEC), seen, NOW, LIMITS)
    assert of_kind(decided, act.CreatePod), "nothing waits for it"
    return {f"{item.kind}/{item.name}": item for item in of_kind(decided, act.Mend)}


def test_what_the_api_server_and_others_add_is_no_reason_to_write() -> None:
    assert mends(around()) == {}
    assert not of_kind(plan(job(SPEC), around(), NOW, LIMITS), act.Apply)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            body = body[int(name)] if isinstance(body, list) else body[name]
        if value is None:
            body.pop(last, None)
        else:
            body[last] = value

    return change


EDITS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("Service/demo-aggregator", _set("spec.selector", {"app": "other"}), "spec.selector"),
    ("Service/demo-aggregator", _set("spec.selector.canary", "1"), "spec.selector"),
    ("Service/demo-aggregator", _set("spec.type", "ClusterIP"), "spec.type"),
    ("Service/demo-aggregator", _set("spec.ports.0.targetPort", 80), "spec.ports"),
    ("Service/demo-aggregator", _set("spec.ports", []), "spec.ports"),
    ("Service/demo-aggregator", _set("metadata.annotations.lb", "public"), "metadata.annotations.lb"),
    ("NetworkPolicy/demo-aggregator", _set("spec.ingress.0.from", [{}]), "spec.ingress"),
    ("NetworkPolicy/demo-clients", _set("spec.ingress", [{}]), "spec.ingress"),
    ("NetworkPolicy/demo-clients", _set("spec.podSelector", {}), "spec.podSelector.matchLabels"),
    ("PodDisruptionBudget/demo-aggregator", _set("spec.minAvailable", 0), "spec.minAvailable"),
    ("Service/demo-aggregator", _set("metadata.labels", {}), "metadata.labels.app.kubernetes.io/managed-by"),
    ("ConfigMap/demo-job", _set("metadata.ownerReferences", None), "metadata.ownerReferences"),
    ("Secret/demo-ca", _set("metadata.labels", {}), "metadata.labels.app.kubernetes.io/managed-by"),
    ("PersistentVolumeClaim/demo-checkpoints", _set("metadata.ownerReferences", []), "metadata.ownerReferences"),
]


@pytest.mark.parametrize(("key", "edit", "field"), EDITS)
def test_each_edit_is_put_back(key: str, edit: Callable[[dict[str, Any]], None], field: str) -> None:
    there = as_stored()
    edit(there[key])
    found = mends(around(live=there))
    assert set(found) == {key}
    assert found[key].fields[0] == field
    assert found[key].reason == "Restored"
    after = {**there[key], **{name: found[key].body[name] for name in ("spec", "metadata") if name in found[key].body}}
    assert unmet(found[key].body, after) == []


def test_only_labels_and_owners_of_what_cannot_change_are_written() -> None:
    there = as_stored()
    claim = there["PersistentVolumeClaim/demo-checkpoints"]["metadata"]
    other = {"apiVersion": "v1", "kind": "Backup", "name": "b", "uid": "another"}
    claim |= {"labels": {}, "ownerReferences": [other]}
    (mend,) = mends(around(live=there)).values()
    assert not mend.whole and set(mend.body) == {"kind", "metadata"}
    assert [one["uid"] for one in mend.body["metadata"]["ownerReferences"]] == ["another", UID]


def test_an_object_of_another_version_is_brought_up_to_date_without_an_event() -> None:
    there = as_stored()
    service = there["Service/demo-aggregator"]
    service["metadata"]["annotations"].pop("isthmus.dev/rendered")
    service["spec"]["ports"][0] |= {"name": "grpc"}
    (mend,) = mends(around(live=there)).values()
    assert mend.reason is None


def test_a_deleted_object_is_made_again_and_an_event_says_so() -> None:
    key = "PodDisruptionBudget/demo-aggregator"
    seen = around(present=frozenset(as_stored()) - {key}, vanished=frozenset({key}))
    decided = plan(job(SPEC), seen, NOW, LIMITS)
    assert [f"{item.kind}/{item.name}" for item in of_kind(decided, act.Apply)] == [key]
    words = "the PodDisruptionBudget demo-aggregator was deleted and is created again"
    assert act.Emit("Warning", "Restored", words) in decided.events
    fresh = plan(job(SPEC), replace(seen, vanished=frozenset()), NOW, LIMITS)
    assert "Restored" not in [event.reason for event in fresh.events]


class Server:
    """A fake API server that stores applied objects without some fields."""

    def __init__(self, keeps: Callable[[dict[str, Any]], None] = lambda body: None) -> None:
        self.keeps = keeps
        self.events: list[str] = []

    async def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        stored = copy.deepcopy(body)
        self.keeps(stored)
        return stored

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        self.events.append(body["message"])
        return {"metadata": {"name": "event"}}


async def mended(server: Server, action: act.Mend) -> JobCache:
    kube, jobs, cache = cast(Kube, server), JobStore(), JobCache(UID)
    holds = SiteHolds(kube, jobs, SiteStore())
    await Effects(kube, jobs, PodStore(), cast(Bridges, None), holds).perform(job(SPEC), cache, [action], NOW)
    return cache


async def test_an_edit_that_comes_back_is_not_fought() -> None:
    there = as_stored()
    _set("spec.type", "ClusterIP")(there["Service/demo-aggregator"])
    (mend,) = mends(around(live=there)).values()
    server = Server()
    assert (await mended(server, mend)).unmendable == {}
    assert server.events == ["the Service demo-aggregator was edited (spec.type) and is restored"]
    stubborn = Server(_set("spec.type", "ClusterIP"))
    cache = await mended(stubborn, mend)
    assert (cache.unmendable, stubborn.events) == ({"Service/demo-aggregator": ("spec.type",)}, [])
    assert mends(around(live=there, unmendable=cache.unmendable)) == {}
    # Another edit is restored.
    _set("spec.selector", {"app": "other"})(there["Service/demo-aggregator"])
    assert set(mends(around(live=there, unmendable=cache.unmendable))) == {"Service/demo-aggregator"}


async def test_a_key_that_apply_leaves_in_a_selector_is_removed() -> None:
    there = as_stored()
    _set("spec.selector.canary", "1")(there["Service/demo-aggregator"])
    (mend,) = mends(around(live=there)).values()

    class Open(Server):
        """Merges selectors, as API servers before Kubernetes 1.22 do."""

        async def apply(self, body: dict[str, Any]) -> dict[str, Any]:
            self.stored = copy.deepcopy(body)
            self.stored["spec"]["selector"]["canary"] = "1"
            return copy.deepcopy(self.stored)

        async def patch(self, kind: str, namespace: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
            assert (kind, namespace, name) == ("Service", "team", "demo-aggregator")
            assert patch == {"spec": {"selector": {"canary": None}}}
            del self.stored["spec"]["selector"]["canary"]
            return self.stored

    server = Open()
    assert (await mended(server, mend)).unmendable == {}
    assert server.events == ["the Service demo-aggregator was edited (spec.selector) and is restored"]


async def test_a_refused_mend_is_tried_again_later() -> None:
    there = as_stored()
    _set("spec.type", "ClusterIP")(there["Service/demo-aggregator"])
    (mend,) = mends(around(live=there)).values()

    class Refusing(Server):
        async def apply(self, body: dict[str, Any]) -> dict[str, Any]:
            raise KubeError(422, "may not be changed")

    server = Refusing()
    cache = await mended(server, mend)
    assert server.events == []
    assert mends(around(live=there, refusals=dict(cache.refusals))) == {}


OLD = "0f9a7c1e-0000-4000-8000-00000000dead"
CLAIM = "PersistentVolumeClaim/demo-checkpoints"


def restored(**annotations: str) -> dict[str, Any]:
    """Return the claim of an earlier job of this name, as restored from a backup."""
    former = replace(job(SPEC), uid=OLD)
    return {
        "kind": "PersistentVolumeClaim",
        "metadata": {**metadata(former, "demo-checkpoints"), "annotations": annotations},
        "spec": {"volumeName": "pv-7"},
    }


class Holding:
    """A fake API server with one claim."""

    def __init__(self, claim: dict[str, Any]) -> None:
        self.claim = claim

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.claim if kind == "PersistentVolumeClaim" else None


@pytest.mark.parametrize(
    ("change", "offered"),
    [
        ({}, True),
        ({"annotations": {}}, False),
        ({"annotations": {"isthmus.dev/adopt": "another"}}, False),
        ({"deletionTimestamp": "2030-01-01T00:00:00Z"}, False),
        ({"ownerReferences": [{"kind": "StatefulSet", "uid": "s", "controller": True}]}, False),
        ({"ownerReferences": [], "labels": {}}, True),
    ],
)
async def test_a_claim_of_an_earlier_job_is_taken_only_where_it_is_offered(
    change: dict[str, Any], offered: bool
) -> None:
    claim = restored(**{"isthmus.dev/adopt": "demo"})
    claim["metadata"] |= change
    found = await dependents.load(
        cast(Kube, Holding(claim)), job(SPEC), NOW, LIMITS, SiteStore(), NO_ROOT, resting=False
    )
    assert (set(found.adoptable) == {CLAIM}) is offered
    assert any(key.startswith(CLAIM) for key in found.conflicting) is not offered


def test_an_offered_claim_is_adopted_and_the_aggregator_continues_from_it() -> None:
    there = as_stored()
    del there[CLAIM]
    seen = around(present=frozenset(there), live=there, adoptable={CLAIM: restored(**{"isthmus.dev/adopt": "demo"})})
    decided = plan(job(SPEC), seen, NOW, LIMITS)
    (mend,) = of_kind(decided, act.Mend)
    assert not of_kind(decided, act.CreatePod), "first the claim is this job's"
    assert not of_kind(decided, act.Apply), "it is not written over"
    assert mend.reason == "Adopted"
    patch = mend.body["metadata"]
    assert patch["labels"]["isthmus.dev/job-uid"] == UID
    assert patch["annotations"] == {"isthmus.dev/adopt": None, "isthmus.dev/adopted-from": OLD}
    assert [one["uid"] for one in patch["ownerReferences"]] == [UID]
    there[CLAIM] = {"metadata": {**patch, "annotations": {"isthmus.dev/adopted-from": OLD}}, "spec": {}}
    after = plan(job(SPEC), around(live=there), NOW, LIMITS)
    (pod,) = [item for item in of_kind(after, act.CreatePod) if item.name == "demo-aggregator"]
    command = pod.body["spec"]["containers"][0]["command"]
    assert command[-2:] == ["--former-job", OLD]
    assert not of_kind(after, act.Mend)


def test_the_status_says_how_to_continue_from_a_claim_that_is_in_the_way() -> None:
    decided = plan(job(SPEC), around(conflicting=(f"{CLAIM} (of the job demo)",)), NOW, LIMITS)
    assert decided.status["message"] == (
        "aggregator: waits for object names that are taken: PersistentVolumeClaim/demo-checkpoints (of the job"
        " demo) (to continue with this claim: kubectl annotate pvc demo-checkpoints isthmus.dev/adopt=demo --namespace"
        " team)"
    )
