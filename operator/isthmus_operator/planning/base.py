"""Planning of the objects that a job's pods need: missing ones are created, edited ones are restored."""

from collections.abc import Mapping
from typing import Any

from isthmus_contracts.api.federated_job_status import Reason

from .. import names
from ..state.observed import Observed
from .actions import Apply, CreateAuthority, IssueCertificate, Mend, RenewAuthority
from .context import PlanContext
from .desired import (
    COMPARED,
    Desired,
    adoption_patch,
    authority_days,
    desired,
    differences,
    metadata_patch,
    site_names,
)


def _note_lost_volume(context: PlanContext, missing: list[Desired]) -> None:
    """Report that completed rounds are lost with their claim, if a new one is to be created."""
    completed = int((context.job.status.get("rounds") or {}).get("completed") or 0)
    if completed and any(item.kind == "PersistentVolumeClaim" for item in missing):
        context.volume_lost = True
        claim = names.checkpoints(context.job.name)
        lost = f"the claim {claim} is gone, and {completed} completed rounds with it"
        message = f"{lost}: a new one is created, and training starts again with round 1"
        context.emit("Warning", Reason.AGGREGATOR_LOST, message)


def plan_base(context: PlanContext) -> bool:
    """Plan missing and edited objects. Return True if all exist, so that pods can be created."""
    observed = context.observed
    complete = True
    wanted = desired(context.job, context.spec, context.options, observed.sites, observed.trust)
    absent = [item for item in wanted if not _present(item, observed) and item.key not in observed.adoptable]
    _note_lost_volume(context, absent)
    for item in wanted:
        if _present(item, observed):
            _mend(context, item)
            continue
        complete = False
        # Certificates need an existing CA, so that those of an earlier CA can be recognized.
        waits = isinstance(item.action, IssueCertificate) and (
            not observed.authority or (item.action.signing is not None and not item.action.signing.trust)
        )
        if item.key in observed.adoptable:
            _adopt(context, item)
        elif not waits and not context.refused(item.key):
            if item.key in observed.vanished and not context.volume_lost:
                context.emit(
                    "Warning", Reason.RESTORED, f"the {item.kind} {item.name} was deleted and is created again"
                )
            context.actions.append(item.action)
    authority = names.authority(context.job.name)
    if observed.authority and observed.authority_ends and not context.refused(f"Secret/{authority}"):
        # Afterwards all certificates are issued again; until then the existing ones are valid.
        context.actions.append(RenewAuthority(authority, authority_days(context.spec)))
    if not complete:
        context.requeue_after(context.options.resync)
    return complete


def _present(item: Desired, observed: Observed) -> bool:
    match item.action:
        case CreateAuthority():
            return bool(observed.authority)
        case IssueCertificate():
            return item.name in observed.certificates
    return item.key in observed.present


def _mend(context: PlanContext, item: Desired) -> None:
    """Restore an edited object, and update it after changes of sites or the admin's defaults."""
    observed = context.observed
    live = observed.live.get(item.key)
    policy = item.kind == "NetworkPolicy"
    if live is None or context.refused(item.key):
        return
    if policy and not all(name in observed.sites for name in site_names(context.spec)):
        return  # if a site is gone, its policy stays, since arrays may still run there
    fields = differences(context.job, item, live)
    if not fields or tuple(fields) == observed.unmendable.get(item.key):
        return
    if isinstance(item.action, Apply) and item.kind in COMPARED:
        rendered = (live.get("metadata") or {}).get("annotations") or {}
        ours = item.action.body["metadata"]["annotations"][names.ANNOTATION_RENDERED]
        edited = rendered.get(names.ANNOTATION_RENDERED) == ours
        reason = Reason.RESTORED if edited else None
        context.actions.append(Mend(item.action.body, tuple(fields), reason, whole=True))
    else:
        context.actions.append(Mend(_addressed(context, item, metadata_patch(context.job, item, live)), tuple(fields)))


def _adopt(context: PlanContext, item: Desired) -> None:
    """Take over an earlier job's claim that was offered by an annotation."""
    if context.refused(item.key):
        return
    patch = adoption_patch(context.job, item, context.observed.adoptable[item.key])
    context.actions.append(Mend(_addressed(context, item, patch), ("metadata",), Reason.ADOPTED))


def _addressed(context: PlanContext, item: Desired, patch: Mapping[str, Any]) -> dict[str, Any]:
    where = {"name": item.name, "namespace": context.job.namespace}
    return {"kind": item.kind, "metadata": {**where, **patch["metadata"]}}
