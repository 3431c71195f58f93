"""Reviews of manifests for the admission webhook, with the reconciler's own checks. Pure.

Nothing depends on it: without the webhook, the reconciler reports the same messages in the status.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import ConditionType
from isthmus_contracts.api.hpc_site import HpcSiteSpec
from isthmus_contracts.manifests.manifest import ManifestError, parse_site_spec, parse_spec

from ..planning.acceptance import Rejection, examine
from ..planning.status import is_true
from ..render.defaults import NONE, JobDefaults
from ..state.observed import Job, Observed


@dataclass(frozen=True)
class Answer:
    """The result of a review: whether the object may be stored, and messages for the user."""

    allowed: bool
    message: str = ""
    warnings: tuple[str, ...] = ()


def review_job(
    new: Mapping[str, Any],
    old: Mapping[str, Any] | None,
    accepted: FederatedJobSpec | None,
    sites: Mapping[str, HpcSiteSpec],
    allowed: frozenset[str],
    given: JobDefaults = NONE,
) -> Answer:
    """Review a FederatedJob. ``accepted``: the spec in force, if the job has one."""
    if old is not None and (new.get("spec") == old.get("spec") or _deleted(new)):
        # Only labels, finalizers or the operator's record changed.
        return Answer(True)
    if accepted is None and old is not None and is_true(old.get("status") or {}, ConditionType.ACCEPTED):
        # Accepted, but not yet reconciled by this operator process: the stored spec is the accepted one, except for
        # changes made while the webhook was down.
        accepted = _parsed(old)
    verdict = examine(_job(new), Observed(accepted=accepted, sites=sites), allowed, given)
    if isinstance(verdict, Rejection):
        if verdict.waits and accepted is None:
            # The job waits until an admin creates or opens the site.
            return Answer(True, warnings=(f"{verdict.reason}: {verdict.message}; the job waits for it",))
        return Answer(False, f"{verdict.reason}: {verdict.message}")
    if verdict.ineffective is not None:
        return Answer(False, verdict.ineffective.refused)
    return Answer(True, warnings=_masked(verdict.spec, sites))


def _masked(spec: FederatedJobSpec, sites: Mapping[str, HpcSiteSpec]) -> tuple[str, ...]:
    """Return a warning if the Service hides client addresses that a site's clientCIDRs restrict."""
    expose = spec.aggregator.expose
    if expose.type == "ClusterIP" or expose.external_traffic_policy == "Local":
        return ()
    named = dict.fromkeys(pool.hpc.site_ref.name for pool in spec.pools if pool.hpc is not None)
    narrow = [name for name in named if name in sites and not any(c.endswith("/0") for c in sites[name].client_cidrs)]
    if not narrow:
        return ()
    return (
        "spec.aggregator.expose.externalTrafficPolicy: is Cluster, so that clients may appear with a node's address,"
        f" which the clientCIDRs of HPCSite {', '.join(narrow)} do not match; set Local if they cannot connect",
    )


def review_site(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> Answer:
    """Review an HPCSite."""
    if old is not None and (new.get("spec") == old.get("spec") or _deleted(new)):
        return Answer(True)
    try:
        parse_site_spec(new.get("spec"))
    except ManifestError as error:
        return Answer(False, f"InvalidSpec: {error}")
    return Answer(True)


def defaults(new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a JSON patch that sets derived fields which the manifest leaves open; empty for an invalid manifest."""
    spec = new.get("spec")
    try:
        parsed = parse_spec(spec)
    except ManifestError:
        return []
    assert isinstance(spec, Mapping)
    patch: list[dict[str, Any]] = []
    for part, field, value in (
        ("selection", "minClients", parsed.min_clients),
        ("stragglers", "minUpdates", parsed.min_updates),
    ):
        if part not in spec:
            patch.append({"op": "add", "path": f"/spec/{part}", "value": {field: value}})
        elif field not in (spec[part] or {}):
            patch.append({"op": "add", "path": f"/spec/{part}/{field}", "value": value})
    return patch


def _job(body: Mapping[str, Any]) -> Job:
    metadata = body.get("metadata") or {}
    return Job(
        name=str(metadata.get("name") or ""),
        namespace=str(metadata.get("namespace") or ""),
        uid=str(metadata.get("uid") or "00000000-0000-0000-0000-000000000000"),
        generation=int(metadata.get("generation") or 0),
        created=dt.datetime.min.replace(tzinfo=dt.UTC),
        spec=body.get("spec") or {},
    )


def _parsed(body: Mapping[str, Any]) -> FederatedJobSpec | None:
    try:
        return parse_spec(body.get("spec"))
    except ManifestError:
        return None


def _deleted(body: Mapping[str, Any]) -> bool:
    return bool((body.get("metadata") or {}).get("deletionTimestamp"))
