"""Answers users who ask for a Slurm task's log: they may write to their FederatedJob, and not to the site's bridge."""

import json
import logging
from collections.abc import Mapping

from isthmus_contracts import identities as ids

from ..effects.bridge import Bridges
from ..effects.bridge_channels import BridgeError
from ..effects.kube import Kube, KubeError
from ..planning.hpc_arrays import holder, parts_of
from ..planning.plan import load_record
from ..render.hpc import key
from ..render.pod import owned
from ..state.job_cache import JobCache
from ..state.observed import Job
from ..state.pod_store import job_uid_of

log = logging.getLogger(__name__)

_MAX_LINES = 1000
_MAX_BYTES = 256 * 1024  # of a ConfigMap that every look at the job may read


class TaskLogs:
    """Reads from the bridge what the annotation asks for, and puts it into a ConfigMap of the job's."""

    def __init__(self, kube: Kube, bridges: Bridges, cluster: str) -> None:
        self._kube = kube
        self._bridges = bridges
        self._cluster = cluster

    async def answer(self, job: Job, cache: JobCache) -> None:
        """Answers once; a request that was answered before an operator's restart is answered again."""
        if not job.log_request or job.deleted is not None or cache.log_answered == job.log_request:
            return
        cache.log_answered = job.log_request
        try:
            request = json.loads(job.log_request)
            pool, index, lines = str(request["pool"]), int(request["index"]), int(request.get("lines", 0))
            if index < 0 or not 0 <= lines <= _MAX_LINES:
                raise ValueError("index or lines out of range")
            said = {"id": str(request["id"])[:64], **await self._read(job, pool, index, lines)}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            log.warning("%s/%s: malformed log request: %s", job.namespace, job.name, error)
            return
        try:
            await self._hand_on(job, ids.log_answer(job.name), said)
        except KubeError as error:
            if not error.definite:
                cache.log_answered = ""  # at the next look at the job again
            log.warning("%s/%s: the log cannot be handed on: %s", job.namespace, job.name, error)

    async def _hand_on(self, job: Job, name: str, said: Mapping[str, str]) -> None:
        # The apply is forced: it would take anybody's ConfigMap over.
        known = await self._kube.get("ConfigMap", job.namespace, name)
        if known is not None and job_uid_of(known) != job.uid:
            raise KubeError(
                409, f"the ConfigMap {name} exists and is not this job's; rename or delete it, and ask again"
            )
        await self._kube.apply(owned(job, "ConfigMap", name, {"data": said}))

    async def _read(self, job: Job, pool: str, index: int, lines: int) -> Mapping[str, str]:
        whole = load_record(job)
        if not parts_of(whole, pool):
            return {"error": f"pool {pool!r} has not been submitted to a site"}
        record = holder(whole, pool, index)
        if record is None:
            return {"error": f"pool {pool!r} has no client {index} at a site"}
        try:
            data = await self._bridges.tail(
                record.site, key(self._cluster, job, pool, record.attempt), index - record.first, lines
            )
        except BridgeError as error:
            return {"error": f"{record.site}: {error}"}
        return {"attempt": str(record.attempt), "log": data[-_MAX_BYTES:].decode("utf-8", "replace")}
