"""The reconciler of FederatedJobs: observe, plan, apply."""

import asyncio
import datetime as dt
import logging
import time

from isthmus_contracts.api.federated_job import FederatedJobSpec

from ..effects.aggregators import Aggregators
from ..effects.apply import Effects
from ..effects.kube import KubeError
from ..effects.observe import Observer
from ..effects.site_holds import SiteHolds
from ..metrics import RECONCILE_SECONDS
from ..planning.actions import Emit, Plan, SaveJob
from ..planning.context import PlanOptions
from ..planning.plan import plan
from ..planning.status import finished, is_urgent, merge_patch
from ..state.clock import Clock
from ..state.job_cache import JobCache
from ..state.job_store import JobStore, Key
from ..state.observed import Job
from ..state.pod_store import PodStore
from . import ownership
from .task_logs import TaskLogs

log = logging.getLogger(__name__)

# Counters in the status are written at most this often; transitions are written at once.
_STATUS_INTERVAL = 3.0  # seconds
_AT_ONCE = 0.05
_SOON = 0.3
_OWNER_CHECK_INTERVAL = 60.0  # seconds between checks whether another operator still serves a job


class JobReconciler:
    """The reconciler of jobs."""

    def __init__(
        self,
        jobs: JobStore,
        pods: PodStore,
        observer: Observer,
        effects: Effects,
        aggregators: Aggregators,
        holds: SiteHolds,
        logs: TaskLogs,
        options: PlanOptions,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._pods = pods
        self._observer = observer
        self._effects = effects
        self._aggregators = aggregators
        self._holds = holds
        self._logs = logs
        self._options = options
        self._clock = clock
        self._caches: dict[Key, JobCache] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile a job. Return the delay in seconds until the next time, or None to wait for an event."""
        job = self._jobs.get(key)
        cache = self._caches.get(key)
        if cache is not None and (job is None or job.uid != cache.uid):
            self._caches.pop(key, None)
            await self._aggregators.forget(cache.uid)
            cache = None
        if cache is None:
            # This also handles the last event of a pod that outlived its job.
            self._pods.forget_all_but({known.uid for known in self._jobs.all()})
        if job is None:
            await self._holds.update(key)
            return None
        if cache is None:
            cache = self._caches[key] = JobCache(job.uid)
        started = time.monotonic()
        try:
            delay = await self._step(job, cache)
            await self._holds.update(key)
            return delay
        except KubeError as error:
            if error.code not in (404, 409):
                raise
            # The job was changed or deleted concurrently: read its current version.
            await self._effects.refresh(job)
            return _SOON
        finally:
            RECONCILE_SECONDS.observe(time.monotonic() - started)

    def count(self) -> int:
        """Return the number of jobs with cached data."""
        return len(self._caches)

    def accepted(self, namespace: str, name: str, uid: str) -> FederatedJobSpec | None:
        """Return the spec in force, if the job has been reconciled since the operator started."""
        cache = self._caches.get((namespace, name))
        known = cache.dependents if cache is not None and cache.uid == uid else None
        return known.accepted if known is not None else None

    async def _step(self, job: Job, cache: JobCache) -> float:
        if other := ownership.other(job, self._options.identity, self._clock.now()):
            return await self._yield_to(job, cache, other)
        cache.other = ""
        if finished(job.status) is None and (
            renewed := ownership.renewal(job, self._options.identity, self._clock.now())
        ):
            # With the resource version that was seen, only one of two concurrent claims succeeds.
            job = await self._effects.claim(job, renewed)
        await self._logs.answer(job, cache)
        observed = await self._observer.observe(job, cache, self._clock.now())
        # Observing took a while, so the plan uses the current time.
        now = self._clock.now()
        decided = plan(job, observed, now, self._options)
        actions = list(decided.actions)
        first = actions[0] if actions else None
        releases = job.deleted is not None and isinstance(actions[-1] if actions else None, SaveJob)
        if isinstance(first, SaveJob) and not releases:
            job = await self._effects.save(job, first)
            actions = actions[1:]
        shown = await self._write_status(job, cache, decided, now)
        if releases:
            # Last, since the job is gone once its finalizer is removed.
            await self._effects.perform(job, cache, [item for item in actions if not isinstance(item, SaveJob)], now)
            final = actions[-1]
            assert isinstance(final, SaveJob)
            await self._effects.save(job, final)
            return self._options.idle
        if actions:
            log.info("%s/%s: %s", job.namespace, job.name, _summary(decided))
            await self._effects.perform(job, cache, actions, now)
            return min(decided.requeue, _SOON)
        if finished(job.status) or job.deleted is not None:
            await self._aggregators.forget(job.uid)
        return decided.requeue if shown else min(decided.requeue, _STATUS_INTERVAL)

    async def _yield_to(self, job: Job, cache: JobCache, other: str) -> float:
        """Leave a job to another operator, and report that once."""
        if cache.other != other:
            cache.other = other
            words = f"another operator, {other}, serves this job; this one, {self._options.identity}, leaves it alone"
            log.warning("%s/%s: %s", job.namespace, job.name, words)
            event = Emit("Warning", "ServedByAnother", f"{words}: only one should serve a namespace")
            await self._effects.emit(job, cache, event, self._clock.now())
        return _OWNER_CHECK_INTERVAL

    async def _write_status(self, job: Job, cache: JobCache, decided: Plan, now: dt.datetime) -> bool:
        """Write the status and the events. Return False if the write of the status was deferred."""
        patch = merge_patch(job.status, decided.status)
        recent = time.monotonic() - cache.status_written < _STATUS_INTERVAL
        put_off = bool(patch) and recent and not is_urgent(job.status, decided.status)
        if patch and not put_off:
            await self._effects.write_status(job, patch)
            cache.status_written = time.monotonic()
        await asyncio.gather(*(self._effects.emit(job, cache, event, now) for event in decided.events))
        return not put_off


def _summary(decided: Plan) -> str:
    counts: dict[str, int] = {}
    for action in decided.actions:
        name = type(action).__name__
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())
