"""Tests of the names of a job's objects: unique, and stable for running jobs."""

import itertools
from dataclasses import replace
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.manifest import MAX_JOB_NAME, parse_spec
from isthmus_operator import names
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.planning.desired import desired
from isthmus_operator.state.job_store import parse_job
from isthmus_operator.state.observed import Job
from tests.support.fake_cluster import NOW, UID, job, of_kind, plan, site, spec, standing

WORDS = ("a", "b", "tls", "0", "1", "ca", "aggregator", "observer", "job", "clients", "abcdef0123", "x-tls")
LIMITS = PlanOptions(network_policies=True)


def wanted(pool: str, kind: str) -> dict[str, Any]:
    """Return a spec with one pool."""
    content = {"cloud": {}} if kind == "cloud" else {"hpc": {"siteRef": {"name": "site"}, "environment": "py"}}
    return spec(cloud=0, pools=[{"name": pool, "replicas": 401 if kind == "cloud" else 1, **content}])


def objects(name: str, pool: str, kind: str) -> set[str]:
    """Return every object of a job, including pods."""
    one = replace(job(wanted(pool, kind)), name=name)
    found = {item.key for item in desired(one, parse_spec(one.spec), LIMITS, {"site": site()})}
    pods = {f"Pod/{names.client(one, pool, index, attempt)}" for index in (0, 1) for attempt in (0, 1)}
    return found | {f"Pod/{names.aggregator(name)}"} | (pods if kind == "cloud" else set())


def test_no_two_jobs_have_an_object_of_the_same_name() -> None:
    joined = {"-".join(part) for size in (1, 2) for part in itertools.product(WORDS, repeat=size)}
    pools = sorted(pool for pool in joined - ids.RESERVED_POOL_NAMES if pool[0].isalpha())
    jobs = [*WORDS[:6], "a-b", "a-tls", "a-b-tls", "a-aggregator", "a-0", "a-b-0"]
    owners: dict[str, tuple[str, str]] = {}
    for name, pool in itertools.product(jobs, pools):
        for kind in ("cloud", "hpc"):
            for key in objects(name, pool, kind):
                # The fixed names are the same for every pool of a job.
                other = owners.setdefault(key, (name, pool))
                assert other[0] == name, f"{key} of {other} and {(name, pool)}"


def test_names_without_a_hyphen_in_the_pools_are_as_they_were() -> None:
    assert names.client(job(), "cloud", 3, 1) == "demo-cloud-3-1"
    assert names.pool_tls(job(), "lumi") == "demo-lumi-tls"
    assert names.clients_tls(job(), "cloud", 400) == "demo-cloud-tls-1"
    first, second = replace(job(), name="a"), replace(job(), name="a-b")
    assert names.client(first, "b-c", 0, 0) == "a-b-c-b88f83c840-0-0"
    assert names.client(second, "c", 0, 0) == "a-b-c-0-0"


def test_the_longest_names_are_valid() -> None:
    longest = replace(job(), name="j" * MAX_JOB_NAME)
    assert len(names.client(longest, "p-" + "q" * 61, 99_999, 999_999)) < 253


def stored(status: dict[str, Any], annotations: dict[str, str]) -> Job:
    return parse_job(
        {
            "metadata": {
                "name": "demo", "namespace": "team", "uid": UID, "creationTimestamp": "2030-01-01T00:00:00Z",
                "annotations": annotations,
            },
            "spec": wanted("gpu-a", "cloud"),
            "status": status,
        }
    )  # fmt: skip


def test_a_job_that_an_earlier_version_accepted_keeps_its_names() -> None:
    accepted = {"conditions": [{"type": "Accepted", "status": "True"}]}
    running = stored(accepted, {})
    assert names.client(running, "gpu-a", 0, 0) == "demo-gpu-a-0-0"
    assert names.clients_tls(running, "gpu-a", 0) == "demo-gpu-a-tls"
    seen = standing(wanted("gpu-a", "cloud"))
    assert not [item for item in of_kind(plan(running, seen, NOW, LIMITS), act.SaveJob) if item.names]
    noted = stored(accepted, {"isthmus.dev/names": "hashed"})
    rejected = stored({"conditions": [{"type": "Accepted", "status": "False"}]}, {})
    for one in (noted, rejected, stored({}, {})):
        assert names.client(one, "gpu-a", 0, 0).startswith("demo-gpu-a-") and not one.old_names
        assert names.client(one, "gpu-a", 0, 0) != "demo-gpu-a-0-0"


def test_the_scheme_is_noted_before_anything_is_made_and_only_where_it_matters() -> None:
    seen = standing(wanted("gpu-a", "cloud"), accepted=None, present=frozenset(), authority="", certificates={})
    new = plan(stored({}, {}), seen, NOW, LIMITS)
    first = new.actions[0]
    assert isinstance(first, act.SaveJob) and first.names == "hashed"
    again = plan(stored({}, {"isthmus.dev/names": "hashed"}), seen, NOW, LIMITS)
    assert not [item for item in of_kind(again, act.SaveJob) if item.names]
    plain = plan(job(), replace(seen, accepted=None), NOW, LIMITS)
    assert not [item for item in of_kind(plain, act.SaveJob) if item.names]
