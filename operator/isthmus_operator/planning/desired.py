"""The desired objects of a running job other than its pods, and their differences from existing ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.hpc_site import HpcSiteSpec

from .. import names
from ..render import aggregator, protect
from ..render.pod import metadata, stamped
from ..state.observed import Job
from .actions import Apply, CopyCode, CreateAuthority, IssueCertificate, Signing
from .context import PlanOptions

_YEAR = 365
_DAY_SECONDS = 86400
# Kinds whose content is compared. Of the others only labels and owners are compared: they are immutable (the job file,
# the files of task.code), may grow (the claim), or are checked by their certificates (Secrets).
COMPARED = ("Service", "NetworkPolicy", "PodDisruptionBudget")
# Maps whose meaning changes if a key is added. Others may add keys to any other map.
_WHOLE_MAPS = ("selector", "podSelector", "matchLabels")
# Lists to which others may add items, with the key that identifies our own.
_OPEN_LISTS = {"metadata.ownerReferences": "uid", "spec.ports": "port"}


@dataclass(frozen=True)
class Desired:
    """A desired object with the action that creates it."""

    kind: str
    name: str
    action: Apply | CopyCode | CreateAuthority | IssueCertificate

    @property
    def key(self) -> str:
        """``Kind/name``."""
        return f"{self.kind}/{self.name}"


def desired(
    job: Job, spec: FederatedJobSpec, options: PlanOptions, sites: Mapping[str, HpcSiteSpec], trust: str = ""
) -> list[Desired]:
    """Return the objects that a running job's pods need, in order of creation. ``trust``: see :class:`Signing`."""
    bodies = [aggregator.job_file(job, spec), aggregator.service(job, spec, options.defaults.service)]
    if spec.aggregator.checkpoint.storage == "PersistentVolumeClaim":
        bodies.append(aggregator.claim(job, spec, options.defaults.storage_class_name))
    if options.network_policies:
        used = [sites[name] for name in site_names(spec) if name in sites]
        outside = [cidr for site in used for cidr in site.client_cidrs]
        bodies += [protect.aggregator_policy(job, options.namespace, outside), protect.clients_policy(job)]
    if spec.aggregator.disruption_budget == "Protect":
        bodies.append(protect.disruption_budget(job))
    actions = [Apply(stamped(body) if body["kind"] in COMPARED else body) for body in bodies]
    found = [Desired(action.kind, action.name, action) for action in actions]
    if spec.task.code is not None:
        copied = CopyCode(spec.task.code.config_map_ref.name, names.code(job.name))
        found.append(Desired("ConfigMap", copied.name, copied))
    authority = CreateAuthority(names.authority(job.name), authority_days(spec))
    found.append(Desired("Secret", authority.secret, authority))
    return [*found, *(Desired("Secret", issued.secret, issued) for issued in certificates(job, spec, trust))]


def certificate_days(spec: FederatedJobSpec) -> int:
    """Return the lifetime of a job's certificates in days: longer than its deadline, and at least a year."""
    deadline = (spec.active_deadline_seconds or 0) // _DAY_SECONDS
    return max(_YEAR, deadline + 2 * 30)


def authority_days(spec: FederatedJobSpec) -> int:
    """Return the lifetime of a job's CA in days."""
    return certificate_days(spec) + _YEAR


def certificates(job: Job, spec: FederatedJobSpec, trust: str = "") -> list[IssueCertificate]:
    """Return every certificate that the job needs, and the signing keys of its cloud clients."""
    days, service = certificate_days(spec), names.aggregator(job.name)
    hosts = (
        ids.aggregator_server_name(job.uid),
        service,
        f"{service}.{job.namespace}",
        f"{service}.{job.namespace}.svc",
        f"{service}.{job.namespace}.svc.cluster.local",
    )
    wanted = [
        IssueCertificate(names.aggregator_tls(job.name), f"{job.name} aggregator", days, hosts=hosts),
        IssueCertificate(
            names.observer_tls(job.name), f"{job.name} observer", days, uris=(ids.observer_identity(job.uid),)
        ),
    ]
    for pool in spec.pools:
        name = f"{job.name} {pool.name}"
        if pool.hpc is not None:
            identity = ids.pool_identity(job.uid, pool.name)
            wanted.append(IssueCertificate(names.pool_tls(job, pool.name), name, days, uris=(identity,)))
            continue
        signing = Signing(job.uid, pool.name, trust) if spec.privacy.secure_aggregation is not None else None
        for first in range(0, pool.size, names.CLIENTS_IN_SECRET):
            indices = range(first, min(first + names.CLIENTS_IN_SECRET, pool.size))
            clients = tuple((index, ids.client_identity(job.uid, pool.name, index)) for index in indices)
            wanted.append(
                IssueCertificate(names.clients_tls(job, pool.name, first), name, days, clients=clients, signing=signing)
            )
    return wanted


def site_names(spec: FederatedJobSpec) -> list[str]:
    """Return the HPCSites of a job's pools."""
    return [pool.hpc.site_ref.name for pool in spec.pools if pool.hpc is not None]


def differences(job: Job, item: Desired, live: Mapping[str, Any]) -> list[str]:
    """Return the fields in which an existing object differs from the desired one, such as ``spec.selector``."""
    if isinstance(item.action, Apply) and item.kind in COMPARED:
        return unmet(item.action.body, live)
    return unmet({"metadata": metadata(job, item.name)}, live)


def unmet(body: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return the fields of ``body`` that an object lacks or has with another value.

    Additional fields of the object count only if they change the meaning.
    """
    wanted = {key: value for key, value in body.items() if key not in ("apiVersion", "kind")}
    return list(dict.fromkeys(_differences(wanted, live, "")))


def removals(wanted: Mapping[str, Any], live: Mapping[str, Any], whole: bool = False) -> dict[str, Any]:
    """Return a merge patch without the keys that others added to maps such as a selector.

    Server-side apply leaves such keys alone where an API server treats these maps as open (Kubernetes before 1.22).
    """
    patch: dict[str, Any] = {key: None for key in live if key not in wanted} if whole else {}
    for key, value in wanted.items():
        found = live.get(key)
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            inner = removals(value, found, key in _WHOLE_MAPS)
            if inner:
                patch[key] = inner
    return patch


def metadata_patch(job: Job, item: Desired, live: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge patch that restores an object's labels and owner, and keeps other owners."""
    wanted = metadata(job, item.name)
    others = [one for one in (live.get("metadata") or {}).get("ownerReferences") or () if one.get("uid") != job.uid]
    return {"metadata": {"labels": wanted["labels"], "ownerReferences": [*others, *wanted["ownerReferences"]]}}


def adoption_patch(job: Job, item: Desired, live: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge patch that transfers an earlier job's claim to this job, and records the earlier job's uid."""
    found = live.get("metadata") or {}
    wanted = metadata(job, item.name)
    others = [one for one in found.get("ownerReferences") or () if one.get("kind") != "FederatedJob"]
    noted = (found.get("annotations") or {}).get(names.ANNOTATION_ADOPTED)
    former = noted or (found.get("labels") or {}).get(ids.LABEL_JOB_UID)
    return {
        "metadata": {
            "labels": wanted["labels"],
            "annotations": {names.ANNOTATION_ADOPT: None, names.ANNOTATION_ADOPTED: former},
            "ownerReferences": [*others, *wanted["ownerReferences"]],
        }
    }


def _differences(wanted: Any, found: Any, path: str) -> list[str]:
    name = path.rpartition(".")[2]
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        if name in _WHOLE_MAPS and set(found) - set(wanted):
            return [path]
        inner = [
            _differences(value, found.get(key), f"{path}.{key}" if path else str(key)) for key, value in wanted.items()
        ]
        return [one for part in inner for one in part]
    if isinstance(wanted, list) and isinstance(found, list):
        return [path] if _lists_differ(wanted, found, path) else []
    # The API server may omit an empty map, list or rule set.
    return [] if wanted == found or (not wanted and not found and wanted is not False) else [path]


def _lists_differ(wanted: Sequence[Any], found: Sequence[Any], path: str) -> bool:
    if path == "spec.ipFamilies":
        return list(found[: len(wanted)]) != list(wanted)
    if path not in _OPEN_LISTS:
        return list(wanted) != list(found)
    key = _OPEN_LISTS[path]
    known = {one.get(key): one for one in found if isinstance(one, Mapping)}
    return any(_differences(one, known.get(one[key]), "") for one in wanted)
