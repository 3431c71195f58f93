"""A job's dependent objects, read by name, so that the operator needs no right to list Secrets."""

import asyncio
import datetime as dt
import json
import time
from collections.abc import Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec

from .. import names
from ..planning.context import PlanOptions
from ..planning.desired import certificates as wanted_certificates
from ..planning.desired import desired
from ..render import references
from ..render.trust import TrustError, needs_trust, trust_of
from ..state.job_cache import Dependents
from ..state.job_store import SiteStore
from ..state.observed import Job, ServiceView
from ..state.parties import site_party
from ..state.pod_store import job_uid_of
from . import certificates
from .kube import Kube
from .signing_root import SigningRoot, SigningRootError

Objects = dict[str, Mapping[str, Any]]  # by Kind/name


async def load(
    kube: Kube,
    job: Job,
    now: dt.datetime,
    options: PlanOptions,
    sites: SiteStore,
    signing_root: SigningRoot,
    resting: bool,
) -> Dependents:
    """Read all dependents; of a suspended job only the accepted spec, if it exists."""
    began = time.monotonic()
    file = f"ConfigMap/{names.job_file(job.name)}"
    objects = await _get(kube, job, [file])
    accepted = _accepted(objects.get(file), job)
    spec = accepted or _spec(job)
    if spec is not None and not (resting and accepted is not None):
        wanted_keys = [item.key for item in desired(job, spec, options, sites.specs) if item.key != file]
        objects |= await _get(kube, job, wanted_keys)
    ours = {key: body for key, body in objects.items() if _is_ours(body, job)}
    others = {key: body for key, body in objects.items() if key not in ours}
    adoptable = {key: body for key, body in others.items() if _is_offered(key, body, job)}
    conflicting = tuple(sorted(_whose(key, body) for key, body in others.items() if key not in adoptable))
    result = Dependents(
        began, accepted, frozenset(ours), _live(ours), conflicting=conflicting, adoptable=_live(adoptable)
    )
    service = ours.get(f"Service/{names.aggregator(job.name)}")
    if service is not None:
        result.service = service_view(service)
    code = ours.get(f"ConfigMap/{names.code(job.name)}")
    if code is not None:
        result.code = tuple(sorted({**(code.get("data") or {}), **(code.get("binaryData") or {})}))
    secret = ours.get(f"Secret/{names.authority(job.name)}")
    result.authority = certificates.load_authority(secret)
    if result.authority is not None:
        result.fingerprint = certificates.fingerprint(secret, result.authority)
        result.authority_ends = certificates.ends_soon(result.authority, now)
    if spec is not None and needs_trust(spec) and not resting:
        await _load_trust(result, spec, sites, signing_root)
    if result.authority is not None and spec is not None:
        good = {}
        for wanted in wanted_certificates(job, spec, result.trust):
            secret = ours.get(f"Secret/{wanted.secret}")
            # In a thread: certificates of hundreds of clients take a while to parse.
            if await asyncio.to_thread(certificates.is_current, secret, wanted, result.authority, now, result.party):
                good[wanted.secret] = certificates.version(secret)
                if wanted.secret == names.observer_tls(job.name):
                    result.observer = certificates.load_credentials(secret)
        result.certificates = good
    return result


async def _load_trust(result: Dependents, spec: FederatedJobSpec, sites: SiteStore, signing_root: SigningRoot) -> None:
    """Set the cluster's party, and the trust of the job's cloud clients or why there is none."""
    try:
        result.party = await signing_root.load()
        found = {name: site_party(sites.specs.get(name), body) for name, body in sites.bodies.items()}
        trust = trust_of(spec, result.party.name, result.party.root, found)
    except (SigningRootError, TrustError) as error:
        result.trust_problem = str(error)
    else:
        result.trust = trust.serialized().decode()


async def forbidden_references(
    kube: Kube, job: Job, accepted: FederatedJobSpec | None, sites: SiteStore
) -> tuple[str, ...]:
    """Return references in templates to other jobs' Secrets, ConfigMaps and claims, and to sites' credentials."""
    spec = accepted or _spec(job)
    if spec is None:
        return ()
    named: dict[tuple[str, str], str] = {}
    for where, template in _templates(spec):
        for field, kind, name in references.references(template, where):
            named.setdefault((kind, name), field)
    credentials = {(site.tls.secret_ref.namespace, site.tls.secret_ref.name) for site in sites.specs.values()}
    bodies = await asyncio.gather(*(kube.get(kind, job.namespace, name) for kind, name in named))
    found = []
    for ((kind, name), field), body in zip(named.items(), bodies, strict=True):
        why = references.forbidden_reason(kind, name, body, job.name, job.uid)
        if kind == references.SECRET and (job.namespace, name) in credentials:
            why = f"the Secret {name!r} holds a site's credentials: no template may name it"
        if why:
            found.append(f"{field}: {why}")
    return tuple(found)


def _templates(spec: FederatedJobSpec) -> list[tuple[str, Mapping[str, Any]]]:
    pools = enumerate(spec.pools)
    clients = [(f"spec.pools[{number}].cloud.template", pool.cloud.template) for number, pool in pools if pool.cloud]
    return [("spec.aggregator.template", spec.aggregator.template), *clients]


def service_view(body: Mapping[str, Any]) -> ServiceView:
    """Reduce a Service to its addresses."""
    spec = body.get("spec") or {}
    ports = spec.get("ports") or ()
    node_port = next((port.get("nodePort") or 0 for port in ports if port.get("port") == ids.AGGREGATOR_PORT), 0)
    ingress = ((body.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    first: Mapping[str, Any] = next(iter(ingress), {})
    cluster_ip = str(spec.get("clusterIP") or "")
    return ServiceView(
        "" if cluster_ip == "None" else cluster_ip, int(node_port), str(first.get("ip") or first.get("hostname") or "")
    )


def _whose(key: str, body: Mapping[str, Any]) -> str:
    """Return an object's key with the job that owns it, if any: names of two jobs' objects can collide."""
    other = (body["metadata"].get("labels") or {}).get(ids.LABEL_JOB)
    return f"{key} (of the job {other})" if other else key


def _is_ours(body: Mapping[str, Any], job: Job) -> bool:
    """Return True if an object's label or owner names the job; either may have been edited."""
    owners = (body.get("metadata") or {}).get("ownerReferences") or ()
    return job_uid_of(body) == job.uid or any(owner.get("uid") == job.uid for owner in owners)


def _is_offered(key: str, body: Mapping[str, Any], job: Job) -> bool:
    """Return True if the job may adopt a claim: an annotation offers it, and no other kind of controller owns it."""
    metadata = body.get("metadata") or {}
    controllers = {one.get("kind") for one in metadata.get("ownerReferences") or () if one.get("controller")}
    offered = (metadata.get("annotations") or {}).get(names.ANNOTATION_ADOPT) == job.name
    free = controllers <= {"FederatedJob"} and not metadata.get("deletionTimestamp")
    return key.startswith("PersistentVolumeClaim/") and offered and free


def _live(ours: Objects) -> dict[str, Mapping[str, Any]]:
    """Return the parts of objects that are compared, without the data of Secrets and ConfigMaps."""
    kept = ("name", "namespace", "labels", "annotations", "ownerReferences")
    return {
        key: {
            "metadata": {name: body["metadata"][name] for name in kept if name in body["metadata"]},
            "spec": body.get("spec") or {},
        }
        for key, body in ours.items()
    }


async def _get(kube: Kube, job: Job, keys: list[str]) -> Objects:
    bodies = await asyncio.gather(*(kube.get(*_place(key, job)) for key in keys))
    return {key: body for key, body in zip(keys, bodies, strict=True) if body is not None}


def _place(key: str, job: Job) -> tuple[str, str, str]:
    kind, _, name = key.partition("/")
    return kind, job.namespace, name


def _accepted(body: Mapping[str, Any] | None, job: Job) -> FederatedJobSpec | None:
    """Return the accepted spec; if it no longer parses (after an upgrade), the manifest's."""
    if body is None or not _is_ours(body, job):
        return None
    try:
        return parse_spec(json.loads(body["data"][names.JOB_FILE])["spec"])
    except (KeyError, TypeError, ValueError):
        return _spec(job)


def _spec(job: Job) -> FederatedJobSpec | None:
    try:
        return parse_spec(job.spec)
    except ManifestError:
        return None
