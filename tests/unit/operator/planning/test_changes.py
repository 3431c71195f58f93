"""Tests of changes to an accepted manifest."""

from typing import Any

import pytest

from isthmus_operator.planning import actions as act
from isthmus_operator.planning.acceptance import Acceptance, examine
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.planning.status import condition
from isthmus_operator.state.job_record import CloudRecord, Record
from tests.support.fake_cluster import NOW, UID, job, of_kind, plan, spec, standing


def grown(replicas: Any, **changes: Any) -> dict[str, Any]:
    wanted = spec(cloud=1, hpc=4, **changes)
    wanted["pools"][1]["hpc"]["maxReplicas"] = 8
    wanted["pools"][1]["replicas"] = replicas
    return wanted


def test_a_mistake_in_a_changed_manifest_leaves_what_may_change_in_force() -> None:
    observed = standing(grown(4))
    wrong = grown(2, suspend=True, backoffLimit=0, selection={"minClients": 99})
    verdict = examine(job(wrong), observed)
    assert isinstance(verdict, Acceptance)
    begin = "the changed manifest is invalid and is ignored, except for fields that may change: "
    assert verdict.message.startswith(f"{begin}spec.selection.minClients: 99")
    assert (verdict.spec.suspend, verdict.spec.backoff_limit, verdict.spec.min_clients) == (True, 0, 2)
    assert (verdict.spec.pool("lumi").replicas, verdict.spec.pool("lumi").size) == (2, 8)
    decided = plan(job(wrong, record=Record({"cloud": CloudRecord(1)}).dump(UID)), observed, NOW, PlanOptions())
    suspended = condition(decided.status, "Suspended")
    assert suspended is not None
    assert suspended["status"] == "True"
    assert not of_kind(decided, act.CreatePod)
    # An invalid value has no effect, and does not affect the others.
    for mistake in (grown("many", suspend=True), grown(4, suspend=True, backoffLimit=-1), grown(99, suspend=True)):
        verdict = examine(job(mistake), observed)
        assert isinstance(verdict, Acceptance)
        assert (verdict.spec.suspend, verdict.spec.backoff_limit, verdict.spec.pool("lumi").replicas) == (True, 3, 4)


@pytest.mark.parametrize("pools", [None, 5, "x", [None], [{"name": []}], [{"name": "lumi", "replicas": {}}]])
def test_any_nonsense_later_leaves_the_job_as_it_is(pools: Any) -> None:
    verdict = examine(job({"suspend": [], "pools": pools}), standing(grown(4)))
    assert isinstance(verdict, Acceptance)
    assert (verdict.spec.suspend, verdict.spec.pool("lumi").replicas) == (False, 4)
