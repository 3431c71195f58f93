"""What everything else of a job stands on: the job file, certificates, the Service, the claim."""

from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason

from .. import names
from ..render import aggregator, protect
from ..state.observed import Job
from .actions import Apply, CopyCode, CreateAuthority, IssueCertificate, RenewAuthority
from .context import PlanContext

_YEAR = 365
_DAY_SECONDS = 86400


def certificate_days(spec: FederatedJobSpec) -> int:
    """Lifetime of a job's certificates: outlives its deadline, and never less than a year."""
    deadline = (spec.active_deadline_seconds or 0) // _DAY_SECONDS
    return max(_YEAR, deadline + 2 * 30)


def certificates(job: Job, spec: FederatedJobSpec) -> list[IssueCertificate]:
    """Every certificate that the job needs."""
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
            wanted.append(IssueCertificate(names.pool_tls(job.name, pool.name), name, days, uris=(identity,)))
            continue
        for first in range(0, pool.size, names.CLIENTS_IN_SECRET):
            indices = range(first, min(first + names.CLIENTS_IN_SECRET, pool.size))
            clients = tuple((index, ids.client_identity(job.uid, pool.name, index)) for index in indices)
            wanted.append(IssueCertificate(names.clients_tls(job.name, pool.name, first), name, days, clients=clients))
    return wanted


def _policies(context: PlanContext) -> list[dict[str, Any]]:
    """The job's NetworkPolicies, where there shall be some."""
    if not context.options.network_policies:
        return []
    sites = [context.observed.sites[name] for name in _site_names(context.spec) if name in context.observed.sites]
    outside = [cidr for site in sites for cidr in site.client_cidrs]
    policy = protect.aggregator_policy(context.job, context.options.namespace, outside)
    return [policy, protect.clients_policy(context.job)]


def _outdated(context: PlanContext, policy: Apply) -> bool:
    """Return whether a policy that is there is one of before a site's clientCIDRs changed. A site that is gone shuts
    nobody out: what runs there goes on."""
    key, observed = f"{policy.kind}/{policy.name}", context.observed
    if key not in observed.present or not all(name in observed.sites for name in _site_names(context.spec)):
        return False
    wanted = str(policy.body["metadata"]["annotations"][names.ANNOTATION_RENDERED])
    return observed.rendered.get(key, "") != wanted


def _site_names(spec: FederatedJobSpec) -> list[str]:
    return [pool.hpc.site_ref.name for pool in spec.pools if pool.hpc is not None]


def _note_lost_volume(context: PlanContext, missing: list[Apply]) -> None:
    """Says that completed rounds are lost with the claim that held them, when a new one is to be made."""
    completed = int((context.job.status.get("rounds") or {}).get("completed") or 0)
    if completed and any(item.kind == "PersistentVolumeClaim" for item in missing):
        context.volume_lost = True
        claim = names.checkpoints(context.job.name)
        words = f"the claim {claim} is gone, and {completed} completed rounds with it: a new one is made, and training"
        context.emit("Warning", Reason.AGGREGATOR_LOST, f"{words} begins again with round 1")


def plan_base(context: PlanContext) -> bool:
    """Asks for what is missing. Returns whether all of it is there, so that pods can be made."""
    job, spec, observed = context.job, context.spec, context.observed
    bodies = [aggregator.service(job, spec, context.options.defaults.service)]
    if observed.accepted is None:
        bodies.insert(0, aggregator.job_file(job, spec))
    if spec.aggregator.checkpoint.storage == "PersistentVolumeClaim":
        bodies.append(aggregator.claim(job, spec, context.options.defaults.storage_class_name))
    policies = _policies(context)
    bodies += policies
    if spec.aggregator.disruption_budget == "Protect":
        bodies.append(protect.disruption_budget(job))
    missing = [Apply(body) for body in bodies]
    missing = [item for item in missing if f"{item.kind}/{item.name}" not in observed.present]
    _note_lost_volume(context, missing)
    outdated = [item for item in map(Apply, policies) if _outdated(context, item)]
    context.actions += [item for item in (*missing, *outdated) if not context.refused(f"{item.kind}/{item.name}")]
    complete = not missing
    key = f"ConfigMap/{names.code(job.name)}"
    if spec.task.code is not None and key not in observed.present:
        complete = False
        if not context.refused(key):
            context.actions.append(CopyCode(spec.task.code.config_map_ref.name, names.code(job.name)))
    authority = names.authority(job.name)
    if not observed.authority:
        complete = False
        if not context.refused(f"Secret/{authority}"):
            context.actions.append(CreateAuthority(authority, certificate_days(spec) + _YEAR))
    # Once there is a CA: what it signs can be told from what an earlier one signed only then.
    else:
        if observed.authority_ends and not context.refused(f"Secret/{authority}"):
            # What it signs is signed anew after that; until then all that is there serves.
            context.actions.append(RenewAuthority(authority, certificate_days(spec) + _YEAR))
        for wanted in certificates(job, spec):
            if wanted.secret not in observed.certificates:
                complete = False
                if not context.refused(f"Secret/{wanted.secret}"):
                    context.actions.append(wanted)
    if not complete:
        context.requeue_after(context.options.resync)
    return complete
