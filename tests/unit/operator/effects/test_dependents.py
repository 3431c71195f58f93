"""Tests of a job's own objects, and of others with the same names."""

from typing import Any, cast

from isthmus_contracts import identities as ids
from isthmus_operator.effects import dependents
from isthmus_operator.effects.kube import Kube
from isthmus_operator.effects.signing_root import SigningRoot
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.state.job_store import SiteStore
from tests.support.fake_cluster import NOW, job

NO_ROOT = SigningRoot(cast(Kube, None), "cluster", "")


class Holding:
    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        labels = {"demo-ca": {ids.LABEL_JOB: "dem", ids.LABEL_JOB_UID: "another"}, "demo-cloud-tls": {}}
        return {"metadata": {"name": name, "labels": labels[name]}} if name in labels else None


async def test_the_owner_of_a_conflicting_object_is_reported() -> None:
    found = await dependents.load(cast(Kube, Holding()), job(), NOW, PlanOptions(), SiteStore(), NO_ROOT, resting=False)
    assert found.conflicting == ("Secret/demo-ca (of the job dem)", "Secret/demo-cloud-tls")
