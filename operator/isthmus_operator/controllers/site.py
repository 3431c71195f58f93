"""The reconciler of HPCSites, which polls each bridge for its site's description."""

import copy
import datetime as dt
import logging
from collections.abc import Callable, Mapping
from typing import Any

from isthmus_contracts.api.federated_job_status import ConditionType, Reason
from isthmus_contracts.pb import bridge_pb2 as pb

from ..effects.bridge import Bridges
from ..effects.bridge_channels import BridgeError
from ..effects.kube import Kube, KubeError
from ..effects.signing_root import SigningRoot, SigningRootError
from ..effects.site_holds import SiteHolds, being_deleted, holders
from ..planning.readiness import assess_site
from ..planning.status import merge_patch, set_condition
from ..state.job_store import SiteStore
from ..state.observed import ProblemKind
from ..state.parties import ClusterParty, site_party
from ..text import one_line

log = logging.getLogger(__name__)

# The poll interval of a site, as a multiple of the resync interval of running jobs.
_WELL = 10
_ILL = 3
_SHOWN = 5  # jobs in a message; status.inUse has them all


class SiteReconciler:
    """The reconciler of HPCSites."""

    def __init__(
        self,
        kube: Kube,
        sites: SiteStore,
        bridges: Bridges,
        holds: SiteHolds,
        signing_root: SigningRoot,
        changed: Callable[[str], None],
        resync: float,
    ) -> None:
        self._kube = kube
        self._sites = sites
        self._bridges = bridges
        self._holds = holds
        self._signing_root = signing_root
        self._changed = changed
        self._resync = resync

    async def reconcile(self, name: str) -> float | None:
        """Poll one site. Return the delay in seconds until the next poll."""
        body = self._sites.bodies.get(name)
        if body is None:
            await self._holds.settle(name)
            await self._bridges.forget(name)
            return None
        answer: pb.Site | BridgeError
        if error := self._sites.errors.get(name):
            answer = BridgeError(ProblemKind.REFUSED, f"{Reason.INVALID_SPEC}: {error}", Reason.INVALID_SPEC)
        else:
            try:
                answer = await self._bridges.describe(name)
            except BridgeError as problem:
                answer = problem
        reachable = isinstance(answer, pb.Site)
        if self._sites.reachable.get(name) != reachable:
            self._sites.reachable[name] = reachable
            log.info("site %s is %s", name, "reachable" if reachable else f"not reachable: {answer}")
            self._changed(name)
        if reachable:
            await self._cancel_orphans(name, body)
        await self._holds.settle(name)
        body = self._sites.bodies.get(name, body)
        before = site_party(self._sites.specs.get(name), body)
        cluster = await self._cluster_party() if isinstance(answer, pb.Site) and answer.signing_root else None
        await self._show(name, body, site_status(body, answer, self._kube.clock.now(), cluster))
        known = self._sites.bodies.get(name)
        if known is not None and site_party(self._sites.specs.get(name), known) != before:
            self._changed(name)  # jobs may wait for its root
        return self._resync * (_WELL if reachable else _ILL)

    async def _cluster_party(self) -> ClusterParty | None:
        try:
            return await self._signing_root.load()
        except SigningRootError as error:
            log.warning("%s", error)
            return None

    async def _cancel_orphans(self, name: str, body: Mapping[str, Any]) -> None:
        """Cancel the arrays that deleted jobs left at this site."""
        for key, orphan in dict((body.get("status") or {}).get("orphans") or {}).items():
            whose = f"{orphan.get('namespace')}/{orphan.get('job')} pool {orphan.get('pool')}"
            try:
                view = await self._bridges.cancel(name, key, 0, "its job was deleted while the site was unreachable")
            except BridgeError as problem:
                if problem.kind is ProblemKind.UNREACHABLE:
                    return
                log.warning("site %s does not cancel the orphan of %s: %s", name, whose, problem)
            else:
                if not view.ended:
                    continue
                log.info("site %s: the orphan of %s is cancelled", name, whose)
            try:
                patch = {"status": {"orphans": {key: None}}}
                self._sites.put(await self._kube.patch("HPCSite", "", name, patch, "status"))
            except KubeError as error:
                if error.code != 404:
                    raise

    async def _show(self, name: str, body: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        patch = merge_patch(body.get("status") or {}, status)
        if not patch:
            return
        try:
            self._sites.put(await self._kube.patch("HPCSite", "", name, {"status": patch}, "status"))
        except KubeError as error:
            if error.code != 404:
                raise
            self._sites.drop(name)


def site_status(
    body: Mapping[str, Any], answer: pb.Site | BridgeError, now: dt.datetime, cluster: ClusterParty | None = None
) -> dict[str, Any]:
    """Return a site's status after a call to its bridge. An unreachable site keeps its last description.

    ``cluster``: this cluster's party, if the site takes part in secure aggregation.
    """
    status: dict[str, Any] = copy.deepcopy(dict(body.get("status") or {}))
    generation = int(body["metadata"].get("generation") or 0)
    status["observedGeneration"] = generation
    if isinstance(answer, pb.Site):
        set_condition(status, ConditionType.REACHABLE, True, Reason.SITE_REACHABLE, "", generation, now)
        status.pop("message", None)
        if held := _held(body):
            status["message"] = held
        assess_site(status, generation, now)
        said = {
            "slurmVersion": answer.slurm_version,
            "cluster": answer.cluster,
            "bridgeVersion": answer.bridge_version,
            "partitions": list(answer.partitions),
            "environments": list(answer.environments),
            "accounts": list(answer.accounts),
            "dataSets": list(answer.data_sets),
            "signing": _signing(answer, cluster),
        }
        if (pinned := (body.get("spec") or {}).get("signingRoot")) and pinned != answer.signing_root:
            has = f"another signing root, {answer.signing_root}" if answer.signing_root else "no signing root"
            status["message"] = f"the bridge reports {has}, where spec.signingRoot is set; ask the site's admin"
        return status | {key: value for key, value in said.items() if value}
    message = one_line(str(answer))
    set_condition(status, ConditionType.REACHABLE, False, answer.reason, message, generation, now)
    held = _held(body)
    status["message"] = f"{held}; {message}" if held else message
    assess_site(status, generation, now)
    return status


def _signing(site: pb.Site, cluster: ClusterParty | None) -> dict[str, str]:
    if not site.signing_root:
        return {}
    said = {"party": one_line(site.name, 253), "root": one_line(site.signing_root, 64)}
    return said if cluster is None else said | {"clusterParty": cluster.name, "clusterRoot": cluster.root}


def _held(body: Mapping[str, Any]) -> str:
    """Return what holds a site that is being deleted; empty for any other site."""
    if not being_deleted(body):
        return ""
    jobs = [f"{job} (pool {pools})" for job, pools in sorted(holders(body).items())]
    orphans = (body.get("status") or {}).get("orphans") or {}
    orphaned = sorted(f"{one.get('namespace')}/{one.get('job')} (pool {one.get('pool')})" for one in orphans.values())
    parts = [("jobs", jobs), ("pools of jobs that are gone", orphaned)]
    words = [f"{what} {', '.join(names[:_SHOWN])}{' ...' if names[_SHOWN:] else ''}" for what, names in parts if names]
    return f"is being deleted, and held by {'; '.join(words)}" if words else "is being deleted"
