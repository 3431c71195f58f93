"""Informer caches of FederatedJobs and HPCSites: the newest known version of each, from watches and responses."""

from collections.abc import Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job_status import ConditionType
from isthmus_contracts.api.hpc_site import HpcSiteSpec
from isthmus_contracts.manifests.manifest import ManifestError, parse_site_spec

from .. import names
from .job_record import ROOM
from .observed import Job
from .timestamps import parse_timestamp

Key = tuple[str, str]  # namespace, name

_ANNOTATIONS = 256 * 1024  # bytes of all of an object's, their keys included
_MARGIN = 4096  # for annotations that others add
_LEAST_ROOM = 4096
_REMEMBERED = 1000  # uids of deleted jobs


class JobStore:
    """FederatedJobs by namespace and name."""

    def __init__(self) -> None:
        self._jobs: dict[Key, Job] = {}
        self._gone: dict[str, None] = {}  # uids, oldest first: a late response must not restore a deleted job

    def get(self, key: Key) -> Job | None:
        """Return the job, if it is known."""
        return self._jobs.get(key)

    def put(self, body: Mapping[str, Any]) -> bool:
        """Store an object unless a newer version is known; return True if it was stored."""
        job = parse_job(body)
        key = job.namespace, job.name
        if job.uid in self._gone:
            return False
        known = self._jobs.get(key)
        same = known is not None and known.uid == job.uid
        if known is not None and same and _number(known.resource_version) >= _number(job.resource_version):
            return False
        self._jobs[key] = job
        return True

    def drop(self, key: Key, uid: str) -> bool:
        """Remove a deleted object."""
        self._gone[uid] = None
        while len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]
        known = self._jobs.get(key)
        if known is None or known.uid != uid:
            return False
        del self._jobs[key]
        return True

    def count(self) -> int:
        """Return the number of jobs."""
        return len(self._jobs)

    def all(self) -> list[Job]:
        """Return all jobs."""
        return list(self._jobs.values())


class SiteStore:
    """HPCSites by name: their manifests, and whether the last call to their bridge succeeded."""

    def __init__(self) -> None:
        self.bodies: dict[str, Mapping[str, Any]] = {}
        self.specs: dict[str, HpcSiteSpec] = {}
        self.errors: dict[str, str] = {}  # of manifests that do not parse
        self.reachable: dict[str, bool] = {}
        self.leaving: set[str] = set()  # being deleted, and held by jobs with pools there

    def put(self, body: Mapping[str, Any]) -> bool:
        """Store a site; return True if its spec changed or it was deleted."""
        name = str(body["metadata"]["name"])
        known = self.bodies.get(name)
        if known is not None and _number(_version(known)) > _number(_version(body)):
            return False
        self.bodies[name] = body
        before = self.specs.get(name)
        self.errors.pop(name, None)
        try:
            self.specs[name] = parse_site_spec(body.get("spec"))
        except ManifestError as error:
            self.specs.pop(name, None)
            self.errors[name] = str(error)
        leaving = name in self.leaving
        if body["metadata"].get("deletionTimestamp"):
            self.leaving.add(name)
        else:
            self.leaving.discard(name)
        return self.specs.get(name) != before or known is None or leaving != (name in self.leaving)

    def drop(self, name: str) -> None:
        """Remove a deleted object."""
        self.bodies.pop(name, None)
        self.specs.pop(name, None)
        self.errors.pop(name, None)
        self.reachable.pop(name, None)
        self.leaving.discard(name)


def parse_job(body: Mapping[str, Any]) -> Job:
    """Convert a FederatedJob object."""
    metadata = body["metadata"]
    created = parse_timestamp(metadata.get("creationTimestamp"))
    assert created is not None
    annotations = metadata.get("annotations") or {}
    others = sum(len(key.encode()) + len(str(annotations[key]).encode()) for key in annotations)
    others -= len(str(annotations.get(names.ANNOTATION_RECORD, "")).encode())
    scheme = str((metadata.get("annotations") or {}).get(names.ANNOTATION_NAMES, ""))
    return Job(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation") or 0),
        created=created,
        spec=body.get("spec") or {},
        status=body.get("status") or {},
        record=str((metadata.get("annotations") or {}).get(names.ANNOTATION_RECORD, "")),
        operator=str((metadata.get("annotations") or {}).get(names.ANNOTATION_OPERATOR, "")),
        log_request=str((metadata.get("annotations") or {}).get(ids.ANNOTATION_LOG_REQUEST, "")),
        names=scheme,
        record_room=max(_LEAST_ROOM, min(ROOM, _ANNOTATIONS - _MARGIN - others)),
        old_names=not scheme and _accepted(body),
        queue=str((metadata.get("labels") or {}).get(ids.LABEL_QUEUE, "")),
        finalizers=tuple(metadata.get("finalizers") or ()),
        deleted=parse_timestamp(metadata.get("deletionTimestamp")),
        resource_version=str(metadata.get("resourceVersion", "")),
    )


def _accepted(body: Mapping[str, Any]) -> bool:
    """Return True if a job was accepted. Without a noted naming scheme, its names have no hashes."""
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(item.get("type") == ConditionType.ACCEPTED and item.get("status") == "True" for item in conditions)


def _version(body: Mapping[str, Any]) -> str:
    return str(body["metadata"].get("resourceVersion", ""))


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0
