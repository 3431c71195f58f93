"""Reads a job's Secrets, Service, ConfigMap and claim: by name, so that the operator need not list Secrets."""

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
from ..planning.base import certificates as wanted_certificates
from ..render import references
from ..state.job_cache import Dependents
from ..state.job_store import SiteStore
from ..state.observed import Job, ServiceView
from ..state.pod_store import job_uid_of
from . import certificates
from .kube import Kube

Objects = dict[str, Mapping[str, Any]]  # by Kind/name


async def load(kube: Kube, job: Job, now: dt.datetime, network_policies: bool, resting: bool) -> Dependents:
    """Reads them all; of a job that rests only what was accepted, if that is there."""
    began = time.monotonic()
    file = f"ConfigMap/{names.job_file(job.name)}"
    objects = await _get(kube, job, [file])
    accepted = _accepted(objects.get(file), job)
    spec = accepted or _spec(job)
    if spec is not None and not (resting and accepted is not None):
        objects |= await _get(kube, job, _expected(job, spec, network_policies))
    ours = {key: body for key, body in objects.items() if job_uid_of(body) == job.uid}
    conflicting = tuple(sorted(_whose(key, objects[key]) for key in set(objects) - set(ours)))
    result = Dependents(began, accepted, frozenset(ours), _rendered(ours), conflicting)
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
    if result.authority is not None and spec is not None:
        good = {}
        for wanted in wanted_certificates(job, spec):
            secret = ours.get(f"Secret/{wanted.secret}")
            # Aside: those of hundreds of clients take a while to read.
            if await asyncio.to_thread(certificates.stands, secret, wanted, result.authority, now):
                good[wanted.secret] = certificates.version(secret)
                if wanted.secret == names.observer_tls(job.name):
                    result.observer = certificates.load_credentials(secret)
        result.certificates = good
    return result


async def forbidden_references(
    kube: Kube, job: Job, accepted: FederatedJobSpec | None, sites: SiteStore
) -> tuple[str, ...]:
    """What the job's templates name and may not: other jobs' Secrets, ConfigMaps and claims, and sites' credentials."""
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
        why = references.verdict(kind, name, body, job.name, job.uid)
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
    """Cuts a Service down to its addresses."""
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
    """Return an object's key, with the job that it belongs to, if any: the names of two jobs' objects may be alike."""
    other = (body["metadata"].get("labels") or {}).get(ids.LABEL_JOB)
    return f"{key} (of the job {other})" if other else key


def _rendered(ours: Objects) -> dict[str, str]:
    """Return which policies were written, as far as that can be told."""
    annotations = {key: body["metadata"].get("annotations") or {} for key, body in ours.items()}
    return {key: str(found.get(names.ANNOTATION_RENDERED, "")) for key, found in annotations.items()
            if key.startswith("NetworkPolicy/")}  # fmt: skip


def _expected(job: Job, spec: FederatedJobSpec, network_policies: bool) -> list[str]:
    secrets = [names.authority(job.name), *(wanted.secret for wanted in wanted_certificates(job, spec))]
    keys = [f"Service/{names.aggregator(job.name)}", *(f"Secret/{secret}" for secret in secrets)]
    if network_policies:
        keys += [f"NetworkPolicy/{name}" for name in (names.aggregator(job.name), names.clients_policy(job.name))]
    if spec.aggregator.disruption_budget == "Protect":
        keys.append(f"PodDisruptionBudget/{names.aggregator(job.name)}")
    if spec.task.code is not None:
        keys.append(f"ConfigMap/{names.code(job.name)}")
    if spec.aggregator.checkpoint.storage == "PersistentVolumeClaim":
        keys.append(f"PersistentVolumeClaim/{names.checkpoints(job.name)}")
    return keys


async def _get(kube: Kube, job: Job, keys: list[str]) -> Objects:
    bodies = await asyncio.gather(*(kube.get(*_place(key, job)) for key in keys))
    return {key: body for key, body in zip(keys, bodies, strict=True) if body is not None}


def _place(key: str, job: Job) -> tuple[str, str, str]:
    kind, _, name = key.partition("/")
    return kind, job.namespace, name


def _accepted(body: Mapping[str, Any] | None, job: Job) -> FederatedJobSpec | None:
    """The spec that was accepted. One that does not parse any more (a newer operator) is taken from the manifest."""
    if body is None or job_uid_of(body) != job.uid:
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
