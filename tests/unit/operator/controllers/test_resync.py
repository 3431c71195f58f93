"""Tests of the periodic lists and of the probes' checks of their age."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from isthmus_operator.controllers import resync as module
from isthmus_operator.controllers.resync import MAX_AGE, Resync
from isthmus_operator.effects.kube import KubeError
from isthmus_operator.servers.health import MAX_RECONCILE, Health
from isthmus_operator.state.job_store import JobStore, SiteStore


def job(name: str, namespace: str = "team", version: int = 5) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{namespace}-{name}", "resourceVersion": str(version),
                "creationTimestamp": "2030-01-01T00:00:00Z"}  # fmt: skip
    return {"metadata": metadata, "spec": {}}


def site(name: str, uid: str = "") -> dict[str, Any]:
    spec = {"endpoint": "b:1", "tls": {"secretRef": {"name": "s", "namespace": "n"}}, "allowedNamespaces": ["*"]}
    return {"metadata": {"name": name, "uid": uid or f"uid-{name}", "resourceVersion": "5"}, "spec": spec}


class Cluster:
    """A fake API server with lists, and an operator's stores."""

    def __init__(self, *namespaces: str) -> None:
        self.jobs, self.sites = JobStore(), SiteStore()
        self.there: list[dict[str, Any]] = []
        self.sites_there: list[dict[str, Any]] = []
        self.meanwhile: list[dict[str, Any]] = []
        self.lists = 0
        self.fails = False
        self.forbidden: set[str] = set()
        self.podless: set[str] = set()
        self.woken: list[str] = []
        self.resync = Resync(
            self.jobs, self.sites, namespaces,
            job_seen=self.jobs.put, job_gone=self._job_gone, site_seen=self.sites.put, site_gone=self._site_gone,
        )  # fmt: skip

    def _job_gone(self, key: tuple[str, str], uid: str) -> None:
        self.woken.append("/".join(key))
        self.jobs.drop(key, uid)

    def _site_gone(self, name: str) -> None:
        self.woken.append(name)
        self.sites.drop(name)

    async def probe(self, where: str) -> None:
        if where.split("/")[4] in self.podless:
            raise KubeError(403, "pods is forbidden")

    async def all(self, kind: str, namespace: str) -> AsyncIterator[dict[str, Any]]:
        self.lists += 1
        if namespace in self.forbidden:
            raise KubeError(403, "federatedjobs is forbidden")
        if self.fails:
            raise KubeError(0, "no answer")
        for body in self.there if kind == "FederatedJob" else self.sites_there:
            if namespace in ("", body["metadata"].get("namespace")):
                yield body
        for body in self.meanwhile:
            self.jobs.put(body)


async def test_unnoticed_deletions_and_creations_are_applied() -> None:
    cluster = Cluster()
    for body in (job("stays"), job("ghost")):
        cluster.jobs.put(body)
    for body in (site("stays"), site("ghost"), site("again")):
        cluster.sites.put(body)
    cluster.there = [job("stays"), job("new")]
    cluster.sites_there = [site("stays"), site("again", "another")]
    cluster.meanwhile = [job("meanwhile")]
    await cluster.resync.once(cluster)  # type: ignore[arg-type]
    assert {item.name for item in cluster.jobs.all()} == {"stays", "new", "meanwhile"}
    assert set(cluster.sites.specs) == {"stays", "again"}
    assert cluster.woken == ["team/ghost", "ghost"]


async def test_only_served_namespaces_are_listed() -> None:
    cluster = Cluster("team", "other")
    cluster.there = [job("a"), job("b", "other"), job("c", "third")]
    await cluster.resync.once(cluster)  # type: ignore[arg-type]
    assert {item.name for item in cluster.jobs.all()} == {"a", "b"}


async def test_a_namespace_that_is_refused_does_not_keep_the_others_from_being_listed() -> None:
    cluster = Cluster("first", "second", "third")
    health = Health(cluster.resync)
    health.ready.set()
    cluster.forbidden, cluster.podless = {"first"}, {"second"}
    cluster.there = [job("a", "first"), job("b", "second"), job("c", "third")]
    await cluster.resync.once(cluster)  # type: ignore[arg-type]
    assert {item.name for item in cluster.jobs.all()} == {"b", "c"}
    expected = {"first": "federatedjobs is forbidden", "second": "pods is forbidden"}
    assert (health.report()["refused"], health.report()["ready"]) == (expected, True)
    cluster.podless |= {"third"}
    await cluster.resync.once(cluster)  # type: ignore[arg-type]
    assert health.report()["ready"] is False
    cluster.forbidden = cluster.podless = set()
    await cluster.resync.once(cluster)  # type: ignore[arg-type]
    assert (health.report()["refused"], health.report()["ready"]) == ({}, True)
    assert {item.name for item in cluster.jobs.all()} == {"a", "b", "c"}


async def test_a_list_that_fails_changes_nothing_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", 0.05)
    monkeypatch.setattr(module, "_SETTLE", 0.0)
    cluster = Cluster()
    cluster.jobs.put(job("known"))
    cluster.fails = True
    running = asyncio.create_task(cluster.resync.run(cluster))  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(30):
            # Requested by a watch that was restarted.
            cluster.resync.mark_stale()
            while cluster.lists < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert [item.name for item in cluster.jobs.all()] == ["known"]
            cluster.fails = False
            while cluster.jobs.all():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_the_probes_distinguish_a_missing_api_server_from_a_stuck_operator() -> None:
    cluster = Cluster()
    health = Health(cluster.resync)
    health.ready.set()
    assert (health.report()["alive"], health.report()["ready"]) == (True, True)
    # Lists are tried but fail: the data gets old, and a restart would not help.
    cluster.resync._made -= MAX_AGE
    assert (health.report()["alive"], health.report()["ready"]) == (True, False)
    # No list was even tried.
    cluster.resync._try_change -= MAX_RECONCILE
    assert health.report()["alive"] is False
    await cluster.resync.once(cluster)  # type: ignore[arg-type]
    assert health.report()["ready"] is True
