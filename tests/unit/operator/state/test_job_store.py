"""Tests of the caches of FederatedJobs and HPCSites with events in any order."""

from typing import Any

from isthmus_operator.state.job_store import JobStore, SiteStore

KEY = ("team", "demo")


def body(version: int = 5, uid: str = "u1", **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "demo",
            "namespace": "team",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": "2030-01-01T00:00:00Z",
            **metadata,
        },
        "spec": {"rounds": version},
    }


def test_the_newest_version_counts() -> None:
    jobs = JobStore()
    assert jobs.put(body(5))
    assert not jobs.put(body(5))
    assert not jobs.put(body(4))
    assert jobs.put(body(6))
    known = jobs.get(KEY)
    assert known is not None
    assert known.spec["rounds"] == 6


def test_a_late_answer_does_not_bring_a_deleted_job_back() -> None:
    jobs = JobStore()
    jobs.put(body(5))
    assert jobs.drop(KEY, "u1")
    assert not jobs.put(body(6))
    assert jobs.get(KEY) is None
    # A new job of that name is stored.
    assert jobs.put(body(2, uid="u2"))
    assert not jobs.drop(KEY, "u1")
    assert [job.uid for job in jobs.all()] == ["u2"]


def test_the_stored_fields_of_a_job() -> None:
    jobs = JobStore()
    jobs.put(
        body(
            annotations={"isthmus.dev/record": "{}"},
            finalizers=["isthmus.dev/cleanup"],
            deletionTimestamp="2030-01-02T00:00:00Z",
            generation=3,
        )
    )
    job = jobs.get(KEY)
    assert job is not None
    assert (job.record, job.finalizers, job.generation) == ("{}", ("isthmus.dev/cleanup",), 3)
    assert job.deleted is not None


def test_sites_that_do_not_parse_are_kept_as_errors() -> None:
    sites = SiteStore()
    site = {"metadata": {"name": "s", "resourceVersion": "1"}, "spec": {"endpoint": "nowhere"}}
    assert sites.put(site)
    assert "s" not in sites.specs
    assert "spec.endpoint" in sites.errors["s"]
    sites.drop("s")
    assert not sites.bodies
    assert not sites.errors
