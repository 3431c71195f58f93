"""Slurm task logs for users, who can annotate their FederatedJob but cannot call the site's bridge."""

import json
import logging
from collections.abc import Mapping

from isthmus_contracts import identities as ids

from ..effects.bridge import Bridges
from ..effects.bridge_channels import BridgeError
from ..effects.kube import Kube, KubeError
from ..planning.hpc_arrays import arrays_of, holder
from ..render.hpc import key
from ..render.pod import owned
from ..state.job_cache import JobCache
from ..state.observed import Job
from ..state.pod_store import job_uid_of
from ..state.stored_record import load_record

log = logging.getLogger(__name__)

_MAX_LINES = 1000
_MAX_BYTES = 256 * 1024  # of the ConfigMap with the log


class TaskLogs:
    """Reader of requested logs: it copies them from the bridge into a ConfigMap of the job."""

    def __init__(self, kube: Kube, bridges: Bridges, cluster: str) -> None:
        self._kube = kube
        self._bridges = bridges
        self._cluster = cluster

    async def answer(self, job: Job, cache: JobCache) -> None:
        """Serve a request once. After a restart of the operator, the last request is served again."""
        if not job.log_request or job.deleted is not None or cache.log_answered == job.log_request:
            return
        cache.log_answered = job.log_request
        try:
            request = json.loads(job.log_request)
            pool, index, lines = str(request["pool"]), int(request["index"]), int(request.get("lines", 0))
            if index < 0 or not 0 <= lines <= _MAX_LINES:
                raise ValueError("index or lines out of range")
            answer = {"id": str(request["id"])[:64], **await self._read(job, pool, index, lines)}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            log.warning("%s/%s: malformed log request: %s", job.namespace, job.name, error)
            return
        try:
            await self._store(job, ids.log_answer(job.name), answer)
        except KubeError as error:
            if not error.definite:
                cache.log_answered = ""  # retry with the next reconciliation
            log.warning("%s/%s: the log cannot be stored: %s", job.namespace, job.name, error)

    async def _store(self, job: Job, name: str, answer: Mapping[str, str]) -> None:
        # The apply is forced, so it would take over any ConfigMap.
        known = await self._kube.get("ConfigMap", job.namespace, name)
        if known is not None and job_uid_of(known) != job.uid:
            raise KubeError(
                409,
                f"the ConfigMap {name} exists and is not this job's; rename or delete it, and request the log again",
            )
        await self._kube.apply(owned(job, "ConfigMap", name, {"data": answer}))

    async def _read(self, job: Job, pool: str, index: int, lines: int) -> Mapping[str, str]:
        whole = load_record(job)
        if not arrays_of(whole, pool):
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
