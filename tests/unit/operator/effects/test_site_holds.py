"""Tests of the finalizer of HPCSites: a site stays while jobs have pools there."""

import asyncio
import copy
from dataclasses import replace
from typing import Any, cast

import pytest

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.identities import FINALIZER
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_operator.controllers.site import site_status
from isthmus_operator.effects.bridge_channels import BridgeError
from isthmus_operator.effects.kube import Kube, KubeError
from isthmus_operator.effects.site_holds import SiteHolds, pools_by_site
from isthmus_operator.planning.acceptance import Rejection, examine
from isthmus_operator.planning.status import merge_patch
from isthmus_operator.state.job_record import ArrayKey, ArrayState, Record, Setback
from isthmus_operator.state.job_store import JobStore, SiteStore
from isthmus_operator.state.observed import Job, ProblemKind
from tests.support.fake_cluster import NOW, UID, World, array, job, plan, site, spec, standing

KEY = ("team", "demo")


class Server:
    """A fake API server with one HPCSite and FederatedJobs: merge patches, versions and finalizers."""

    def __init__(self) -> None:
        self.site: dict[str, Any] | None = {
            "metadata": {"name": "site", "resourceVersion": "1"},
            "spec": {
                "endpoint": "bridge.example:7444",
                "tls": {"secretRef": {"name": "bridge", "namespace": "isthmus"}},
                "allowedNamespaces": ["*"],
            },
        }
        self.jobs: dict[tuple[str, str], dict[str, Any]] = {}
        self.failures: list[KubeError] = []
        self.meddle = 0  # number of next patches that lose against another writer
        self.writes: list[str] = []
        self.prunes = False  # as with the CRD of an earlier version, which has no status.inUse

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        if kind == "HPCSite":
            return copy.deepcopy(self.site)
        if namespace == "private":
            raise KubeError(403, "cannot get federatedjobs")
        return self.jobs.get((namespace, name))

    async def patch(self, kind: str, namespace: str, name: str, body: Any, subresource: str = "") -> dict[str, Any]:
        assert (kind, namespace, name) == ("HPCSite", "", "site")
        if self.failures:
            raise self.failures.pop()
        if self.site is None:
            raise KubeError(404, "not found")
        if self.meddle and "metadata" in body:
            self.meddle -= 1
            self._next()
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted not in (None, self.site["metadata"]["resourceVersion"]):
            raise KubeError(409, "the object has been modified")
        self.site = _merged(self.site, body)
        if self.prunes:
            self.site.get("status", {}).pop("inUse", None)
        self.writes.append(subresource or "metadata")
        self._next()
        answer = copy.deepcopy(self.site)
        if self.site["metadata"].get("deletionTimestamp") and not self.finalizers():
            self.site = None
        return answer

    def delete(self) -> dict[str, Any]:
        """Delete the site, and return it as the watch reports it."""
        assert self.site is not None
        self.site["metadata"]["deletionTimestamp"] = "2030-01-01T00:00:00Z"
        self._next()
        return copy.deepcopy(self.site)

    def finalizers(self) -> list[str]:
        return [] if self.site is None else list(self.site["metadata"].get("finalizers") or ())

    def in_use(self) -> dict[str, str]:
        return {} if self.site is None else (self.site.get("status") or {}).get("inUse") or {}

    def _next(self) -> None:
        assert self.site is not None
        self.site["metadata"]["resourceVersion"] = str(int(self.site["metadata"]["resourceVersion"]) + 1)


def _merged(before: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    after = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = _merged(after.get(key), value)
    return after


class Setting:
    """The stores of one operator with that server."""

    def __init__(self, server: Server | None = None) -> None:
        self.server = server or Server()
        self.jobs, self.sites = JobStore(), SiteStore()
        self.holds = SiteHolds(cast(Kube, self.server), self.jobs, self.sites)
        assert self.server.site is not None
        self.sites.put(copy.deepcopy(self.server.site))

    def put(self, one: Job, version: str) -> None:
        self.jobs.put(body_of(one, version))


def body_of(one: Job, version: str = "1") -> dict[str, Any]:
    """Return a FederatedJob as the API server reports it."""
    return {
        "metadata": {
            "name": one.name, "namespace": one.namespace, "uid": one.uid, "resourceVersion": version,
            "creationTimestamp": "2030-01-01T00:00:00Z", "annotations": {"isthmus.dev/record": one.record},
        },
        "spec": one.spec,
    }  # fmt: skip


def using(**changes: Any) -> Job:
    """Return a job with a pool that was requested from the site."""
    entry = array(**{"state": ArrayState.REQUESTED, **changes})
    return job(spec(hpc=2), record=Record(hpc={ArrayKey("lumi"): entry}).dump(UID))


def test_the_site_is_held_from_before_the_first_request_to_the_end_of_the_last_pool() -> None:
    async def scenario() -> None:
        at = Setting()
        at.put(using(), "1")
        await at.holds.hold("site", using())
        assert (at.server.finalizers(), at.server.in_use()) == ([FINALIZER], {"team/demo": "lumi"})
        # The entry is written first, so that no other operator removes the finalizer.
        assert at.server.writes == ["status", "metadata"]
        await at.holds.hold("site", using())
        await at.holds.update(KEY)
        assert len(at.server.writes) == 2
        assert at.sites.put(at.server.delete()), "its jobs hear of it"
        await at.holds.settle("site")
        assert at.server.site is not None
        at.put(using(state=ArrayState.ENDED), "2")
        await at.holds.update(KEY)
        assert at.server.site is None

    _run(scenario())


def test_with_the_crd_of_an_earlier_version_jobs_run_without_the_finalizer(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        at = Setting()
        at.server.prunes = True
        at.put(using(), "1")
        await at.holds.hold("site", using())
        await at.holds.hold("site", using())
        await at.holds.settle("site")
        assert (at.server.finalizers(), at.server.in_use()) == ([], {})
        at.server.prunes = False
        await at.holds.hold("site", using())
        assert (at.server.finalizers(), at.server.in_use()) == ([FINALIZER], {"team/demo": "lumi"})

    _run(scenario())
    assert caplog.text.count("its CRD is that of an earlier version") == 1


def test_a_job_that_is_gone_holds_no_site_but_its_orphans_do() -> None:
    async def scenario() -> None:
        at = Setting()
        at.put(using(), "1")
        await at.holds.hold("site", using())
        assert at.server.site is not None
        orphan = {"namespace": "team", "job": "demo", "pool": "lumi", "since": "2030-01-01T00:00:00Z"}
        at.server.site["status"]["orphans"] = {"key": orphan}
        at.sites.put(at.server.delete())
        at.jobs.drop(KEY, UID)
        await at.holds.update(KEY)
        assert (at.server.in_use(), at.server.finalizers()) == ({}, [FINALIZER])
        del at.server.site["status"]["orphans"]["key"]
        at.sites.put(at.server.delete())
        await at.holds.settle("site")
        assert at.server.site is None

    _run(scenario())


def test_a_site_in_use_of_an_earlier_version_gets_its_finalizer_and_an_unused_one_loses_it() -> None:
    async def scenario() -> None:
        at = Setting()
        at.put(using(), "1")
        await at.holds.settle("site")
        assert (at.server.finalizers(), at.server.in_use()) == ([FINALIZER], {"team/demo": "lumi"})
        at.put(using(state=ArrayState.ENDED), "2")
        await at.holds.settle("site")
        assert (at.server.finalizers(), at.server.in_use()) == ([], {})

    _run(scenario())


def test_entries_of_jobs_that_this_operator_does_not_serve_are_read_from_the_jobs() -> None:
    async def scenario() -> None:
        server = Server()
        assert server.site is not None
        entries = {"other/runs": "lumi", "other/over": "lumi", "other/gone": "lumi", "private/unknown": "lumi"}
        server.site["status"] = {"inUse": entries}
        server.site["metadata"]["finalizers"] = ["someone.else/keeps", FINALIZER]
        server.jobs["other", "runs"] = body_of(replace(using(), name="runs", namespace="other"))
        server.jobs["other", "over"] = body_of(replace(using(state=ArrayState.ENDED), name="over", namespace="other"))
        at = Setting(server)
        at.sites.put(server.delete())
        await at.holds.settle("site")
        assert server.in_use() == {"other/runs": "lumi", "private/unknown": "lumi"}
        assert server.finalizers() == ["someone.else/keeps", FINALIZER]

    _run(scenario())


def test_another_writer_of_the_site_loses_nothing() -> None:
    async def scenario() -> None:
        at = Setting()
        at.put(using(), "1")
        at.server.meddle = 3
        await at.holds.hold("site", using())
        assert at.server.finalizers() == [FINALIZER]
        at.put(using(state=ArrayState.ENDED), "2")
        at.server.meddle = 1
        await at.holds.update(KEY)
        assert at.server.finalizers() == [FINALIZER], "it is removed on top of the version that was seen, or not at all"
        assert at.server.site is not None
        at.sites.put(copy.deepcopy(at.server.site))
        await at.holds.settle("site")
        assert at.server.finalizers() == []

    _run(scenario())


def test_nothing_is_submitted_to_a_site_that_is_being_deleted() -> None:
    async def scenario() -> None:
        at = Setting()
        at.put(using(), "1")
        at.sites.put(at.server.delete())
        with pytest.raises(BridgeError, match="HPCSite site is being deleted"):
            await at.holds.hold("site", using())
        assert at.server.writes == []

    _run(scenario())
    leaving = standing(spec(hpc=2), leaving_sites=frozenset({"site"}))
    decided = plan(job(spec(hpc=2)), leaving, NOW, World.options)
    assert not [item for item in decided.actions if type(item).__name__ == "EnsurePool"]
    pools = {pool["name"]: pool for pool in decided.status["pools"]}
    assert pools["lumi"]["reason"] == "SiteNotFound: HPCSite site is being deleted"
    verdict = examine(job(spec(hpc=2)), replace(leaving, accepted=None))
    assert isinstance(verdict, Rejection) and verdict.waits
    assert verdict.message == "spec.pools[1].hpc.siteRef.name: HPCSite 'site' is being deleted"


def test_without_the_right_to_write_sites_jobs_run_as_before(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        at = Setting()
        at.put(using(), "1")
        for _ in range(2):
            at.server.failures = [KubeError(403, "cannot patch hpcsites")]
            await at.holds.hold("site", using())
        assert at.server.finalizers() == []

    _run(scenario())
    assert caplog.text.count("HPCSites in use get no finalizer") == 1


def test_the_status_of_a_site_that_is_being_deleted_names_what_holds_it() -> None:
    body = copy.deepcopy(Server().site)
    assert body is not None
    body["metadata"] |= {"generation": 1, "deletionTimestamp": "2030-01-01T00:00:00Z"}
    orphan = {"namespace": "old", "job": "past", "pool": "gpu", "since": "2030-01-01T00:00:00Z"}
    body["status"] = {"inUse": {"team/demo": "gpu, lumi"}, "orphans": {"key": orphan}}
    words = (
        "is being deleted, and held by jobs team/demo (pool gpu, lumi); pools of jobs that are gone old/past (pool gpu)"
    )
    assert site_status(body, pb.Site(), NOW)["message"] == words
    down = site_status(body, BridgeError(ProblemKind.UNREACHABLE, "no route"), NOW)
    assert down["message"] == f"{words}; no route"
    # The patch does not contain what another writer adds to inUse.
    assert "inUse" not in merge_patch(body["status"], down)


@pytest.mark.parametrize(
    ("changes", "pools"),
    [
        ({}, {"site": "lumi"}),
        ({"state": ArrayState.ACCEPTED}, {"site": "lumi"}),
        ({"state": ArrayState.WAITING}, {}),  # not requested yet, or between two attempts
        ({"state": ArrayState.ENDED}, {}),
        ({"setback": Setback(given_up=Reason.QUEUE_TIMEOUT)}, {"site": "lumi"}),
    ],
)
def test_a_pool_holds_its_site_while_it_may_exist(changes: dict[str, Any], pools: dict[str, str]) -> None:
    assert pools_by_site(Record.load(using(**changes).record, UID)) == pools
    assert site().allows("team")


def _run(coroutine: Any) -> None:
    asyncio.run(coroutine)
