"""Lists of all FederatedJobs and HPCSites in addition to the watches: periodic, and after a watch was restarted.

A watch does not report deletions that happened while it was down. If all objects of a kind were deleted, it does not
even show that it was down.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..effects.kube import Kube, KubeError, path
from ..metrics import NAMESPACE_SERVED
from ..state.job_store import JobStore, Key, SiteStore

log = logging.getLogger(__name__)

INTERVAL = 300.0  # seconds
# Older data is not reliable: three lists in a row have failed by then.
MAX_AGE = 3 * INTERVAL
RETRY = 30.0
# A restarted watch reports each object; wait until it has. Seconds.
_SETTLE = 1.0

Body = Mapping[str, Any]


class Resync:
    """The periodic lists, and their age."""

    def __init__(
        self,
        jobs: JobStore,
        sites: SiteStore | None,
        namespaces: Sequence[str],
        *,
        job_seen: Callable[[Body], None],
        job_gone: Callable[[Key, str], None],
        site_seen: Callable[[Body], None],
        site_gone: Callable[[str], None],
    ) -> None:
        """``sites``: None if no sites are served. ``namespaces``: empty for all."""
        self._jobs = jobs
        self._sites = sites
        self._namespaces = tuple(namespaces) or ("",)
        self._job_seen, self._job_gone = job_seen, job_gone
        self._site_seen, self._site_gone = site_seen, site_gone
        self.refused: dict[str, str] = {}
        """Namespaces in which the operator may not list FederatedJobs or pods, with the API server's messages."""
        self._stale = asyncio.Event()
        self._made = self._try_change = time.monotonic()

    def mark_stale(self) -> None:
        """Request a list soon, since a watch may have missed something."""
        self._stale.set()

    def refusal(self, namespace: str) -> None:
        """Handle a forbidden request: check whether the whole namespace is refused since its roles are gone."""
        if namespace in self._namespaces and namespace not in self.refused and self.idle() > RETRY:
            self.mark_stale()

    def serves(self) -> bool:
        """Return True if at least one namespace is served."""
        return len(self.refused) < len(self._namespaces)

    def age(self) -> float:
        """Return the seconds since the last complete list, or since the start."""
        return time.monotonic() - self._made

    def idle(self) -> float:
        """Return the seconds since the last attempt to list."""
        return time.monotonic() - self._try_change

    async def run(self, kube: Kube) -> None:
        """List periodically until cancelled."""
        # With named namespaces, list at once to learn which of them refuse.
        pause = INTERVAL if self._namespaces == ("",) else 0.0
        while True:
            try:
                async with asyncio.timeout(pause):
                    await self._stale.wait()
                    await asyncio.sleep(_SETTLE)
            except TimeoutError:
                pass
            self._stale.clear()
            try:
                await self.once(kube)
                pause = RETRY if self.refused else INTERVAL
            except KubeError as error:
                log.warning("cannot list FederatedJobs and HPCSites: %s; again in %.0f s", error, RETRY)
                pause = RETRY
            finally:
                self._try_change = time.monotonic()

    async def once(self, kube: Kube) -> None:
        """List the jobs of all namespaces that the operator may read, and the sites.

        Raises :class:`KubeError` if the API server does not answer.
        """
        began, failure = time.monotonic(), None
        for namespace in self._namespaces:
            try:
                await self._list_jobs(kube, namespace)
                if namespace:
                    # A cluster role may still allow listing jobs in a namespace whose own roles are gone.
                    await kube.probe(path("Pod", namespace) + "?limit=1")
                self._served(namespace)
            except KubeError as error:
                if error.code == 403:
                    self._refuse(namespace, str(error))
                else:
                    failure = error
        if self._sites is not None:
            await self._list_sites(kube, self._sites)
        if failure is not None:
            raise failure
        if self.serves():
            self._made = began

    def _refuse(self, namespace: str, words: str) -> None:
        if namespace not in self.refused:
            where = f"the namespace {namespace}" if namespace else "the cluster"
            log.error("%s is not served: %s; see its Role and RoleBinding; tried every %.0f s", where, words, RETRY)
        self.refused[namespace] = words
        if namespace:
            NAMESPACE_SERVED.labels(namespace).set(0)

    def _served(self, namespace: str) -> None:
        if self.refused.pop(namespace, None) is not None:
            log.info("%s is served again", f"the namespace {namespace}" if namespace else "the cluster")
        if namespace:
            NAMESPACE_SERVED.labels(namespace).set(1)

    async def _list_jobs(self, kube: Kube, namespace: str) -> None:
        # Objects that are added while the list is made are not in it, and must not be removed.
        known = {(job.namespace, job.name): job.uid for job in self._jobs.all() if namespace in ("", job.namespace)}
        seen = set()
        async for body in kube.all("FederatedJob", namespace):
            seen.add(str(body["metadata"]["uid"]))
            self._job_seen(body)
        for key, uid in known.items():
            if uid not in seen:
                log.info("%s/%s was deleted, which no watch reported", *key)
                self._job_gone(key, uid)

    async def _list_sites(self, kube: Kube, sites: SiteStore) -> None:
        known = {name: body["metadata"]["uid"] for name, body in sites.bodies.items()}
        seen = set()
        async for body in kube.all("HPCSite", ""):
            seen.add(body["metadata"]["uid"])
            self._site_seen(body)
        for name, uid in known.items():
            still = sites.bodies.get(name)
            if uid not in seen and still is not None and still["metadata"]["uid"] == uid:
                log.info("site %s was deleted, which no watch reported", name)
                self._site_gone(name)
