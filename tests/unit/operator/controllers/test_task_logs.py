"""Tests of requested Slurm task logs."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from isthmus_operator.controllers.task_logs import TaskLogs
from isthmus_operator.effects.kube import KubeError
from isthmus_operator.state.job_cache import JobCache
from isthmus_operator.state.job_record import ArrayKey, Record
from isthmus_operator.state.observed import Job
from tests.support.fake_cluster import UID, array, job, spec

LUMI = ArrayKey("lumi")

NAME = "demo-log"


class Cluster:
    """A fake API server with ConfigMaps, and a site with a log."""

    def __init__(self, **there: Mapping[str, Any]) -> None:
        self.there: dict[str, Mapping[str, Any]] = dict(there)
        self.refusal: KubeError | None = None
        self.tails = 0

    async def get(self, kind: str, namespace: str, name: str) -> Mapping[str, Any] | None:
        assert (kind, namespace) == ("ConfigMap", "team")
        return self.there.get(name)

    async def apply(self, body: Mapping[str, Any]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.there[body["metadata"]["name"]] = body

    async def tail(self, *_: Any) -> bytes:
        self.tails += 1
        return b"line"

    def logs(self) -> TaskLogs:
        return TaskLogs(self, self, "c")  # type: ignore[arg-type]


def asking(request: str = "") -> Job:
    record = Record(hpc={LUMI: array()})
    asked = request or json.dumps({"id": "1", "pool": "lumi", "index": 0})
    return job(spec(cloud=0, hpc=2), record=record.dump(UID), log_request=asked)


def config_map(uid: str = "") -> dict[str, Any]:
    labels = {"isthmus.dev/job-uid": uid} if uid else {}
    return {"metadata": {"name": NAME, "labels": labels}, "data": {"mine": "yes"}}


@pytest.mark.parametrize("there", [{}, {NAME: config_map(UID)}], ids=["absent", "ours"])
async def test_a_log_is_handed_on(there: dict[str, Any]) -> None:
    cluster = Cluster(**there)
    await cluster.logs().answer(asking(), JobCache(UID))
    assert cluster.there[NAME]["data"] == {"id": "1", "attempt": "0", "log": "line"}


@pytest.mark.parametrize("uid", ["", "another"])
async def test_a_foreign_config_map_is_left_alone(uid: str, caplog: pytest.LogCaptureFixture) -> None:
    cluster, cache = Cluster(**{NAME: config_map(uid)}), JobCache(UID)
    for _ in range(3):
        await cluster.logs().answer(asking(), cache)
    assert cluster.there[NAME] == config_map(uid)
    assert cluster.tails == 1, "it is not retried with each reconciliation"
    assert "the ConfigMap demo-log exists and is not this job's" in caplog.text


@pytest.mark.parametrize(("code", "tries"), [(403, 1), (422, 1), (0, 3), (500, 3)])
async def test_only_what_may_yet_succeed_is_tried_again(code: int, tries: int) -> None:
    cluster, cache = Cluster(), JobCache(UID)
    cluster.refusal = KubeError(code, "no")
    for _ in range(3):
        await cluster.logs().answer(asking(), cache)
    assert cluster.tails == tries


@pytest.mark.parametrize("request_", ["{]", "5", '{"id":"1","pool":"lumi","index":1e999}', "[" * 100_000])
async def test_a_malformed_request_is_logged_once(request_: str, caplog: pytest.LogCaptureFixture) -> None:
    cluster, cache = Cluster(), JobCache(UID)
    await cluster.logs().answer(asking(request_), cache)
    await cluster.logs().answer(asking(request_), cache)
    assert caplog.text.count("malformed log request") == 1
    assert not cluster.there
