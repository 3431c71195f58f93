"""The finalizer of an HPCSite in use: a deleted site stays until the last pool of any job there has ended.

``status.inUse`` of the site lists the jobs that hold it. An entry is written before a job's first pool is submitted,
and removed when the job has nothing left at the site. The finalizer is set while there is an entry or an orphan. Both
are shared by all operators of the cluster: each one corrects the entries of jobs that it can read.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.identities import FINALIZER

from ..state.job_record import Record
from ..state.job_store import JobStore, Key, SiteStore, parse_job
from ..state.observed import Job, ProblemKind
from ..state.stored_record import load_record
from .bridge_channels import BridgeError
from .kube import Kube, KubeError

log = logging.getLogger(__name__)

_TRIES = 5  # attempts to write an HPCSite that others change concurrently


class SiteHolds:
    """The manager of the HPCSites' finalizers."""

    def __init__(self, kube: Kube, jobs: JobStore, sites: SiteStore) -> None:
        self._kube = kube
        self._jobs = jobs
        self._sites = sites
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by site
        self._checked: set[str] = set()  # sites whose entries of unknown jobs were looked up
        self._warned = False

    async def hold(self, site: str, job: Job) -> None:
        """Make sure that a site stays while the job has a pool there.

        Raises :class:`BridgeError` if the site is being deleted, or if concurrent changes do not end.
        """
        async with self._locks[site]:
            try:
                await self._hold(site, f"{job.namespace}/{job.name}", pools_by_site(load_record(job)).get(site, ""))
            except KubeError as error:
                self._report(error)

    async def _hold(self, site: str, holder: str, pools: str) -> None:
        body: Mapping[str, Any] | None = self._sites.bodies.get(site)
        if body is None:
            return  # the call to the site reports that
        for _ in range(_TRIES):
            if body is None or being_deleted(body):
                message = f"HPCSite {site} is being deleted"
                raise BridgeError(ProblemKind.UNREACHABLE, message, Reason.SITE_NOT_FOUND)
            if holders(body).get(holder) != pools:
                body = await self._write_holders(site, {holder: pools})
                if body is not None and holders(body).get(holder) != pools:
                    self._warn("the API server drops status.inUse: its CRD is that of an earlier version")
                    return
            elif await self._set_finalizer(site, body, held=True):
                return
            else:
                body = await self._read(site)
        raise BridgeError(ProblemKind.UNREACHABLE, f"HPCSite {site} is being changed by others")

    async def update(self, key: Key) -> None:
        """Release the sites at which a job has nothing left."""
        holder = "/".join(key)
        for name in [name for name, body in self._sites.bodies.items() if holder in holders(body)]:
            async with self._locks[name]:
                job = self._jobs.get(key)
                if job is None or name not in pools_by_site(load_record(job)):
                    await self._release(name, {holder: None})

    async def settle(self, name: str) -> None:
        """Correct a site's entries by the existing jobs, and its finalizer by its entries."""
        async with self._locks[name]:
            body = self._sites.bodies.get(name)
            if body is None:
                self._checked.discard(name)
                return
            gone: list[str] = []
            if being_deleted(body) or name not in self._checked:
                known = {f"{job.namespace}/{job.name}" for job in self._jobs.all()}
                gone = [holder for holder in set(holders(body)) - known if not await self._still_held(name, holder)]
                self._checked.add(name)
            shown, changes = holders(self._sites.bodies.get(name, body)), dict[str, str | None].fromkeys(gone)
            for job in self._jobs.all():
                holder = f"{job.namespace}/{job.name}"
                # Most jobs have no HPC pool: their records need not be parsed.
                unused = '"hpc"' not in job.record and holder not in shown
                pools = None if unused else pools_by_site(load_record(job)).get(name)
                if shown.get(holder) != pools:
                    changes[holder] = pools
            await self._release(name, changes)

    async def _release(self, name: str, changes: Mapping[str, str | None]) -> None:
        try:
            body = await self._write_holders(name, changes) if changes else self._sites.bodies.get(name)
            if body is not None:
                in_use = bool(holders(body) or (body.get("status") or {}).get("orphans"))
                if in_use != (FINALIZER in _finalizers(body)) and not (in_use and being_deleted(body)):
                    await self._set_finalizer(name, body, held=in_use)
        except KubeError as error:
            self._report(error)

    async def _still_held(self, site: str, holder: str) -> bool:
        """Return True if a job that this operator does not know still holds the site."""
        namespace, _, job = holder.partition("/")
        try:
            body = await self._kube.get("FederatedJob", namespace, job)
        except KubeError as error:
            if error.code != 403:
                raise
            return True
        return body is not None and site in pools_by_site(load_record(parse_job(body)))

    async def _write_holders(self, name: str, changes: Mapping[str, str | None]) -> Mapping[str, Any] | None:
        patch = {"status": {"inUse": dict(changes)}}
        try:
            return self._stored(await self._kube.patch("HPCSite", "", name, patch, "status"))
        except KubeError as error:
            if error.code != 404:
                raise
            return None

    async def _set_finalizer(self, name: str, body: Mapping[str, Any], *, held: bool) -> bool:
        """Add or remove the finalizer. Return False if ``body`` is outdated."""
        others = [item for item in _finalizers(body) if item != FINALIZER]
        wanted = [*others, FINALIZER] if held else others
        if held == (FINALIZER in _finalizers(body)):
            return True
        metadata = {"resourceVersion": body["metadata"].get("resourceVersion", ""), "finalizers": wanted}
        try:
            self._sites.put(await self._kube.patch("HPCSite", "", name, {"metadata": metadata}))
        except KubeError as error:
            if error.code not in (404, 409):
                raise
            return False
        return True

    async def _read(self, name: str) -> Mapping[str, Any] | None:
        body = await self._kube.get("HPCSite", "", name)
        return body if body is None else self._stored(body)

    def _stored(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        self._sites.put(body)
        return body

    def _report(self, error: KubeError) -> None:
        """Log once that the operator may not write HPCSites, as with roles of an earlier version."""
        if error.code != 403:
            raise error
        self._warn(str(error))

    def _warn(self, cause: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("HPCSites in use get no finalizer, and can be deleted before their jobs: %s", cause)


def pools_by_site(record: Record) -> dict[str, str]:
    """Return the pools of a job that may run or wait at sites, by site: ``lumi`` or ``gpu, lumi``."""
    found: dict[str, set[str]] = {}
    for key, array in record.hpc.items():
        if array.at_site:
            found.setdefault(array.site, set()).add(key.pool)
    return {site: ", ".join(sorted(pools)) for site, pools in found.items()}


def holders(body: Mapping[str, Any]) -> dict[str, str]:
    """Return the jobs that hold a site, as ``namespace/name``, each with its pools."""
    return dict((body.get("status") or {}).get("inUse") or {})


def being_deleted(body: Mapping[str, Any]) -> bool:
    """Return True if the site is being deleted."""
    return bool(body["metadata"].get("deletionTimestamp"))


def _finalizers(body: Mapping[str, Any]) -> list[str]:
    return list(body["metadata"].get("finalizers") or ())
