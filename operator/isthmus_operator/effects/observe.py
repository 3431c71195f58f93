"""Collection of the state that a plan reads."""

import asyncio
import datetime as dt
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import ConditionType

from .. import names
from ..planning.context import PlanOptions
from ..planning.status import finished, is_true
from ..render import hpc as render_hpc
from ..state.job_cache import Dependents, JobCache
from ..state.job_record import ArrayKey, ArrayRecord, Record
from ..state.job_store import SiteStore
from ..state.observed import FederationView, Job, Observed, PodView, PoolView, ServiceView
from ..state.pod_store import PodStore
from ..state.stored_record import load_record
from . import dependents
from .aggregators import Aggregators
from .bridge import Bridges
from .bridge_channels import BridgeError
from .kube import Kube, KubeError
from .signing_root import SigningRoot

# Dependent objects, which only the operator should change, are checked every this many resyncs.
_DEPENDENTS_RESYNCS = 20
# A watch may miss a deletion while it is down; a list corrects that.
_PODS_AGE = 600.0  # seconds


class Observer:
    """The observer of a job's state in the cluster, at its sites and in its aggregator."""

    def __init__(
        self,
        kube: Kube,
        pods: PodStore,
        sites: SiteStore,
        bridges: Bridges,
        aggregators: Aggregators,
        options: PlanOptions,
        signing_root: SigningRoot,
    ) -> None:
        self._signing_root = signing_root
        self._kube = kube
        self._pods = pods
        self._sites = sites
        self._bridges = bridges
        self._aggregators = aggregators
        self._cluster = options.cluster
        self._options = options
        self._dependents_age = _DEPENDENTS_RESYNCS * options.resync

    async def observe(self, job: Job, cache: JobCache, now: dt.datetime) -> Observed:
        """Collect the observed state. The aggregator is queried last, see ``Observed.federation``."""
        idle = job.deleted is not None or finished(job.status) is not None
        if not idle:
            await self._list_pods(job, cache)
        record = load_record(job)
        pools, base = await asyncio.gather(
            self._poll_sites(job, record, cache, now), self._load_dependents(job, cache, now, idle)
        )
        pods = self._pods.of(job.namespace, job.uid)
        aggregator = next((pod for pod in pods if pod.name == names.aggregator(job.name)), None)
        federation, error = await self._poll_aggregator(job, base, aggregator)
        return Observed(
            record=record,
            pods=pods,
            accepted=base.accepted,
            present=base.present,
            live=base.live,
            adoptable=base.adoptable,
            vanished=base.vanished,
            unmendable=dict(cache.unmendable),
            conflicting=base.conflicting,
            code=base.code,
            forbidden_references=base.forbidden_references,
            authority=base.fingerprint,
            authority_ends=base.authority_ends,
            certificates=base.certificates,
            trust=base.trust,
            trust_problem=base.trust_problem,
            delivered=dict(cache.delivered),
            service=base.service,
            node_address=await self._node_address(base.accepted, base.service, cache, aggregator),
            sites=dict(self._sites.specs),
            leaving_sites=frozenset(self._sites.leaving),
            pools=pools,
            problems=dict(cache.problems),
            refusals=dict(cache.refusals),
            federation=federation,
            federation_error=error,
        )

    async def _list_pods(self, job: Job, cache: JobCache) -> None:
        take_stale, began = self._pods.take_stale(job.uid), time.monotonic()
        if not take_stale and began - cache.pods_listed < _PODS_AGE:
            return
        cache.pods_listed = -math.inf  # if the list fails, it is repeated with the next reconciliation
        known = [pod.uid for pod in self._pods.of(job.namespace, job.uid)]
        listed = await self._kube.list("Pod", job.namespace, f"{ids.LABEL_JOB_UID}={job.uid}")
        self._pods.replace(job.namespace, job.uid, listed.get("items") or (), known)
        cache.pods_listed = began

    async def _load_dependents(self, job: Job, cache: JobCache, now: dt.datetime, idle: bool) -> Dependents:
        known = cache.dependents
        if known is None and idle:
            # Nothing more is created for it.
            return Dependents(-math.inf)
        # The other objects are not needed until it is resumed.
        resting = bool(job.spec.get("suspend")) and is_true(job.status, ConditionType.SUSPENDED)
        lacks = known is not None and (known.accepted is None if resting else _incomplete(known))
        old = known is None or time.monotonic() - known.loaded > self._dependents_age
        if known is None or (not idle and (old or lacks)):
            known = cache.dependents = await dependents.load(
                self._kube, job, now, self._options, self._sites, self._signing_root, resting
            )
            if not resting:
                known.vanished = frozenset(cache.seen - known.present)
            cache.seen |= known.present
            known.forbidden_references = await dependents.forbidden_references(
                self._kube, job, known.accepted, self._sites
            )
        return known

    async def _poll_sites(
        self, job: Job, record: Record, cache: JobCache, now: dt.datetime
    ) -> dict[ArrayKey, PoolView]:
        pending = {key: array for key, array in record.hpc.items() if array.at_site}
        views = await asyncio.gather(*(self._poll_site(job, cache, now, *item) for item in pending.items()))
        return {key: view for key, view in zip(pending, views, strict=True) if view is not None}

    async def _poll_site(
        self, job: Job, cache: JobCache, now: dt.datetime, key: ArrayKey, array: ArrayRecord
    ) -> PoolView | None:
        problem = cache.problems.get(key)
        if problem is not None and not problem.due(now):
            return None
        request = render_hpc.key(self._cluster, job, key.pool, array.attempt)
        try:
            view = await self._bridges.get(array.site, request, array.attempt, array.first)
        except BridgeError as error:
            cache.record_problem(key, error.kind, str(error), now, error.reason)
            return None
        cache.clear_problem(key)
        return view

    async def _poll_aggregator(
        self, job: Job, base: Dependents, pod: PodView | None
    ) -> tuple[FederationView | None, str]:
        if pod is None or pod.phase != "Running" or not pod.ip or base.observer is None:
            await self._aggregators.forget(job.uid)
            return None, ""
        answer = await self._aggregators.ask(job.uid, pod.ip, base.observer)
        return (None, answer) if isinstance(answer, str) else (answer, "")

    async def _node_address(
        self, spec: FederatedJobSpec | None, service: ServiceView | None, cache: JobCache, pod: PodView | None
    ) -> str:
        """Return the address of the aggregator's node, for a NodePort."""
        if pod is None or not pod.node or spec is None or spec.aggregator.expose.type != "NodePort":
            return ""
        if pod.node not in cache.node_addresses:
            try:
                node = await self._kube.get("Node", "", pod.node)
            except KubeError:
                # Without the right to read nodes, use the internal address in the pod's status.
                node = None
            addresses = ((node or {}).get("status") or {}).get("addresses") or ()
            address = node_address(addresses, service.cluster_ip if service is not None else "") or pod.host_ip
            if not address:
                return ""
            cache.node_addresses[pod.node] = address
        return cache.node_addresses[pod.node]


def node_address(addresses: Iterable[Mapping[str, Any]], cluster_ip: str) -> str:
    """Return a node's address: external before internal.

    Dual-stack nodes have addresses of both families; the Service's first family decides, since its NodePort uses it.
    """
    known = [(str(item.get("type")), str(item["address"])) for item in addresses if item.get("address")]
    own = [item for item in known if (":" in item[1]) == (":" in cluster_ip)]
    for found in (dict(reversed(own)), dict(reversed(known))):
        if address := found.get("ExternalIP") or found.get("InternalIP"):
            return address
    return ""


def _incomplete(known: Dependents) -> bool:
    """Return True if objects are still missing, in which case they are read every time."""
    service, accepted = known.service, known.accepted
    if (
        accepted is None
        or known.conflicting
        or known.forbidden_references
        or known.authority is None
        or service is None
    ):
        return True
    return accepted.aggregator.expose.type == "LoadBalancer" and not service.ingress
