"""Execution of a plan's actions in order; client pods are created and deleted concurrently."""

import asyncio
import datetime as dt
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus_contracts.api.federated_job_status import Reason

from .. import names
from ..metrics import ACTIONS, EVENTS, STATUS_WRITES
from ..planning.actions import (
    Action,
    Apply,
    CancelPool,
    CopyCode,
    CreateAuthority,
    CreatePod,
    DeleteJob,
    DeletePod,
    Emit,
    EnsurePool,
    IssueCertificate,
    Mend,
    RecordOrphan,
    RenewAuthority,
    RenewCredentials,
    SaveJob,
    ShrinkPool,
)
from ..planning.desired import removals, unmet
from ..state.job_cache import JobCache
from ..state.job_store import JobStore
from ..state.observed import Job, ProblemKind
from ..state.pod_store import PodStore, belongs_to
from ..state.timestamps import timestamp
from ..text import one_line
from . import certificates, code
from .bridge import Bridges
from .bridge_channels import BridgeError
from .kube import Kube, KubeError
from .site_holds import SiteHolds

log = logging.getLogger(__name__)

_EVENTS_REMEMBERED = 50  # of a job
_EVENT_MESSAGE = 1024  # limit of the API server


class Effects:
    """The executor of actions."""

    def __init__(self, kube: Kube, jobs: JobStore, pods: PodStore, bridges: Bridges, holds: SiteHolds) -> None:
        self._kube = kube
        self._jobs = jobs
        self._pods = pods
        self._bridges = bridges
        self._holds = holds

    async def save(self, job: Job, action: SaveJob) -> Job:
        """Write the job's record and finalizers; fails with a conflict unless the job is as the plan saw it."""
        metadata: dict[str, Any] = {"resourceVersion": job.resource_version}
        if action.record is not None:
            metadata["annotations"] = {names.ANNOTATION_RECORD: action.record}
        if action.names:
            metadata["annotations"] = {**metadata.get("annotations", {}), names.ANNOTATION_NAMES: action.names}
        if action.finalizers is not None:
            metadata["finalizers"] = list(action.finalizers)
        ACTIONS.labels("SaveJob").inc()
        body = await self._kube.patch("FederatedJob", job.namespace, job.name, {"metadata": metadata})
        return self._renewed(job, body)

    async def claim(self, job: Job, annotation: str) -> Job:
        """Write which operator serves the job; fails with a conflict unless the job is as it was seen."""
        annotations = {names.ANNOTATION_OPERATOR: annotation}
        metadata = {"resourceVersion": job.resource_version, "annotations": annotations}
        body = await self._kube.patch("FederatedJob", job.namespace, job.name, {"metadata": metadata})
        return self._renewed(job, body)

    async def write_status(self, job: Job, patch: Mapping[str, Any]) -> Job:
        """Patch the status of this job, by its uid, and not that of a later job of its name."""
        STATUS_WRITES.inc()
        content = {"metadata": {"uid": job.uid}, "status": patch}
        body = await self._kube.patch("FederatedJob", job.namespace, job.name, content, "status")
        return self._renewed(job, body)

    async def refresh(self, job: Job) -> None:
        """Read the job again, since the cached version is outdated."""
        body = await self._kube.get("FederatedJob", job.namespace, job.name)
        if body is None:
            self._jobs.drop((job.namespace, job.name), job.uid)
        else:
            self._jobs.put(body)

    def _renewed(self, job: Job, body: Mapping[str, Any]) -> Job:
        self._jobs.put(body)
        return self._jobs.get((job.namespace, job.name)) or job

    async def emit(self, job: Job, cache: JobCache, event: Emit, now: dt.datetime) -> None:
        """Write a Kubernetes event, or increase the count of an equal one. A failure is only logged."""
        EVENTS.labels(event.reason).inc()
        key = event.reason, event.message
        if key in cache.events:
            name, count = cache.events[key]
            counted = {"count": count + 1, "lastTimestamp": timestamp(now)}
            try:
                await self._kube.patch("Event", job.namespace, name, counted)
            except KubeError:
                del cache.events[key]  # it is gone after an hour
            else:
                cache.events[key] = name, count + 1
                return
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{job.name}.", "namespace": job.namespace},
            "involvedObject": {
                "apiVersion": "isthmus.dev/v1alpha1",
                "kind": "FederatedJob",
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:_EVENT_MESSAGE],
            "source": {"component": "isthmus-operator"},
            "firstTimestamp": timestamp(now),
            "lastTimestamp": timestamp(now),
            "count": 1,
        }
        try:
            made = await self._kube.create(body)
        except KubeError as error:
            log.warning("%s/%s: event %s is lost: %s", job.namespace, job.name, event.reason, error)
            return
        cache.events[key] = str(made["metadata"]["name"]), 1
        if len(cache.events) > _EVENTS_REMEMBERED:
            del cache.events[next(iter(cache.events))]

    async def perform(self, job: Job, cache: JobCache, actions: Sequence[Action], now: dt.datetime) -> None:
        """Carry out every action except SaveJob, and record refusals for the next plan.

        Raises :class:`KubeError` for trouble with the API server as such: at once where it does not answer, or another
        writer was quicker; after the last action where it fails one request, since others may well succeed.
        """
        failure: KubeError | None = None
        for step in _steps(job, actions):
            try:
                await self._perform_side_by_side(job, cache, step, now)
            except KubeError as error:
                if error.definite or not error.answered:
                    raise
                failure = failure or error
        if failure is not None:
            raise failure

    async def _perform_side_by_side(self, job: Job, cache: JobCache, group: Sequence[Action], now: dt.datetime) -> None:
        results = await asyncio.gather(
            *(self._perform_one(job, cache, action, now) for action in group), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _perform_one(self, job: Job, cache: JobCache, action: Action, now: dt.datetime) -> None:
        ACTIONS.labels(type(action).__name__).inc()
        match action:
            case Apply():
                await self._apply(cache, f"{action.kind}/{action.name}", action.body, now)
            case Mend():
                await self._mend(job, cache, action, now)
            case CopyCode():
                source = await self._kube.get("ConfigMap", job.namespace, action.source)
                copied = code.copy(job, action.source, source)
                if isinstance(copied, str):
                    cache.record_refusal(f"ConfigMap/{action.name}", copied, now, by_operator=True)
                else:
                    await self._apply(cache, f"ConfigMap/{action.name}", copied, now)
            case CreateAuthority():
                body = certificates.authority_secret(job, action.secret, action.days, now)
                await self._apply(cache, f"Secret/{action.secret}", body, now)
            case RenewAuthority():
                known = cache.dependents
                if known is not None and known.authority is not None:
                    body = certificates.renewed_authority_secret(
                        job, action.secret, known.authority, known.fingerprint, action.days, now
                    )
                    await self._apply(cache, f"Secret/{action.secret}", body, now)
            case IssueCertificate():
                known = cache.dependents
                lacks_party = action.signing is not None and (known is None or known.party is None)
                if known is not None and known.authority is not None and not lacks_party:
                    make = certificates.leaf_secret
                    body = await asyncio.to_thread(make, job, known.authority, action, now, known.party)
                    await self._apply(cache, f"Secret/{action.secret}", body, now)
            case CreatePod():
                await self._create_pod(job, cache, action, now)
            case DeletePod():
                await self._delete_pod(job, action)
            case EnsurePool() | RenewCredentials() | CancelPool() | ShrinkPool():
                await self._call_site(job, cache, action, now)
            case RecordOrphan():
                orphan = {"namespace": job.namespace, "job": job.name, "pool": action.pool, "since": timestamp(now)}
                body = {"status": {"orphans": {action.key: orphan}}}
                try:
                    await self._kube.patch("HPCSite", "", action.site, body, "status")
                except KubeError as error:
                    if error.code != 404:
                        raise
                    log.warning(
                        "%s/%s: there is no HPCSite %s to note its orphan at", job.namespace, job.name, action.site
                    )
            case DeleteJob():
                await self._kube.delete("FederatedJob", job.namespace, job.name, job.uid)
            case SaveJob():
                raise AssertionError("SaveJob comes before all others")

    async def _apply(self, cache: JobCache, key: str, body: Mapping[str, Any], now: dt.datetime) -> None:
        try:
            await self._kube.apply(body)
        except KubeError as error:
            if not error.answered:
                raise
            cache.record_refusal(key, one_line(str(error)), now)
            log.warning("%s is refused: %s", key, error)
        else:
            cache.clear_refusal(key)
        # Existing objects are read again before pods are created from them.
        if cache.dependents is not None:
            cache.dependents.loaded = -math.inf

    async def _mend(self, job: Job, cache: JobCache, action: Mend, now: dt.datetime) -> None:
        key, fields = f"{action.kind}/{action.name}", ", ".join(action.fields)
        try:
            if action.whole:
                body = await self._kube.apply(action.body)
                if extra := removals(action.body, body):
                    body = await self._kube.patch(action.kind, job.namespace, action.name, extra)
            else:
                patch = {"metadata": action.body["metadata"]}
                body = await self._kube.patch(action.kind, job.namespace, action.name, patch)
        except KubeError as error:
            if not error.answered:
                raise
            cache.record_refusal(key, one_line(str(error)), now)
            log.warning("%s/%s: %s cannot be restored (%s): %s", job.namespace, job.name, key, fields, error)
            return
        cache.clear_refusal(key)
        if cache.dependents is not None:
            cache.dependents.loaded = -math.inf
        if left := tuple(unmet(action.body, body)):
            # The API server does not know these fields, or another writer resets them: do not fight over them.
            cache.unmendable[key] = left
            log.warning("%s/%s: %s stays as it is in %s", job.namespace, job.name, key, ", ".join(left))
        elif action.reason is Reason.ADOPTED:
            words = f"the {action.kind} {action.name} of an earlier job now belongs to this job"
            await self.emit(job, cache, Emit("Normal", action.reason, words), now)
        elif action.reason is not None:
            words = f"the {action.kind} {action.name} was edited ({fields}) and is restored"
            await self.emit(job, cache, Emit("Warning", action.reason, words), now)

    async def _create_pod(self, job: Job, cache: JobCache, action: CreatePod, now: dt.datetime) -> None:
        key = f"Pod/{action.name}"
        try:
            body = await self._kube.create(action.body)
        except KubeError as error:
            if error.code != 409:
                if not error.answered:
                    raise
                cache.record_refusal(key, one_line(str(error)), now)
                log.warning("%s is refused: %s", key, error)
                return
            known = await self._kube.get("Pod", job.namespace, action.name)
            if known is None or not belongs_to(known, job.uid):
                # It belongs to another job, or to an earlier one of this name that is still being deleted.
                cache.record_refusal(key, "a pod of that name exists and is not this job's", now)
                return
            body = known
        cache.clear_refusal(key)
        self._pods.put(body)

    async def _delete_pod(self, job: Job, action: DeletePod) -> None:
        try:
            await self._kube.delete("Pod", job.namespace, action.name, action.uid)
        except KubeError as error:
            # The namespace is being deleted and the operator's roles are gone; its pods end with it.
            if job.deleted is None or error.code != 403:
                raise
            log.info(
                "%s/%s: pod %s is left to the deletion of the namespace: %s",
                job.namespace,
                job.name,
                action.name,
                error,
            )

    async def _code(self, job: Job, action: EnsurePool) -> Mapping[str, Any]:
        if not action.code:
            return {}
        found = await self._kube.get("ConfigMap", job.namespace, action.code)
        if found is None:
            raise BridgeError(ProblemKind.UNREACHABLE, f"ConfigMap {action.code} is missing")
        return found

    async def _call_site(
        self,
        job: Job,
        cache: JobCache,
        action: EnsurePool | RenewCredentials | CancelPool | ShrinkPool,
        now: dt.datetime,
    ) -> None:
        try:
            if isinstance(action, CancelPool):
                await self._bridges.cancel(action.site, action.key, 0, action.reason)
            elif isinstance(action, ShrinkPool):
                await self._bridges.shrink(action.site, action.key, action.replicas)
            else:
                secret = await self._kube.get("Secret", job.namespace, action.secret)
                credentials = certificates.load_credentials(secret)
                if credentials is None:
                    raise BridgeError(ProblemKind.UNREACHABLE, f"Secret {action.secret} is missing")
                if isinstance(action, RenewCredentials):
                    await self._bridges.renew(action.site, action.key, credentials)
                else:
                    await self._holds.hold(action.site, job)
                    files = code.files_of(await self._code(job, action))
                    await self._bridges.ensure(action.site, action.key, action.spec, credentials, files)
                cache.delivered[action.key] = certificates.version(secret)
        except BridgeError as error:
            # A failure to shrink or to renew does not concern the pool itself.
            lesser = isinstance(action, ShrinkPool | RenewCredentials)
            kind = ProblemKind.UNREACHABLE if lesser else error.kind
            cache.record_problem(action.array, kind, str(error), now, error.reason)
            log.warning("%s/%s: pool %s at %s: %s", job.namespace, job.name, action.array, action.site, error)
        else:
            cache.clear_problem(action.array)


def _steps(job: Job, actions: Sequence[Action]) -> list[list[Action]]:
    """Group the actions in order: consecutive creations and deletions of client pods run concurrently."""
    steps: list[list[Action]] = []
    side_by_side = False
    for action in actions:
        # The aggregator goes first: with a short quota, clients without it are of no use.
        leads = isinstance(action, CreatePod) and action.name == names.aggregator(job.name)
        pods = isinstance(action, CreatePod | DeletePod) and not leads
        if pods and side_by_side:
            steps[-1].append(action)
        else:
            steps.append([action])
        side_by_side = pods
    return steps
