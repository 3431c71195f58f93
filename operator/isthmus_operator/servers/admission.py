"""What the API server is told at apply time: the reconciler's own verdict, earlier. Pure.

Nothing depends on it: where the webhook is off or down, the reconciler says the same words in the status.
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
    """Whether the object may be stored, and what the user reads."""

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
    """The verdict over a FederatedJob. ``accepted``: the spec that is in force, if the job has one already."""
    if old is not None and (new.get("spec") == old.get("spec") or _deleted(new)):
        # Labels, finalizers, the operator's own record: whatever the spec is, it was there before.
        return Answer(True)
    if accepted is None and old is not None and is_true(old.get("status") or {}, ConditionType.ACCEPTED):
        # Accepted, and not looked at since this operator started: what is stored is what was accepted, bar what
        # came in while the webhook was away.
        accepted = _parsed(old)
    verdict = examine(_job(new), Observed(accepted=accepted, sites=sites), allowed, given)
    if isinstance(verdict, Rejection):
        if verdict.waits and accepted is None:
            # The admin can still make the site; the job waits for that.
            return Answer(True, warnings=(f"{verdict.reason}: {verdict.message}; the job waits for it",))
        return Answer(False, f"{verdict.reason}: {verdict.message}")
    if verdict.ineffective is not None:
        return Answer(False, verdict.ineffective.refused)
    return Answer(True, warnings=_masked(verdict.spec, sites))


def _masked(spec: FederatedJobSpec, sites: Mapping[str, HpcSiteSpec]) -> tuple[str, ...]:
    """Return a warning where a Service hides from where clients come, and a site's clientCIDRs narrow that."""
    expose = spec.aggregator.expose
    if expose.type == "ClusterIP" or expose.external_traffic_policy == "Local":
        return ()
    named = dict.fromkeys(pool.hpc.site_ref.name for pool in spec.pools if pool.hpc is not None)
    narrow = [name for name in named if name in sites and not any(c.endswith("/0") for c in sites[name].client_cidrs)]
    if not narrow:
        return ()
    return (
        "spec.aggregator.expose.externalTrafficPolicy: is Cluster, so that clients may come from a node's address,"
        f" which the clientCIDRs of HPCSite {', '.join(narrow)} do not match; set Local where they cannot connect",
    )


def review_site(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> Answer:
    """The verdict over an HPCSite."""
    if old is not None and (new.get("spec") == old.get("spec") or _deleted(new)):
        return Answer(True)
    try:
        parse_site_spec(new.get("spec"))
    except ManifestError as error:
        return Answer(False, f"InvalidSpec: {error}")
    return Answer(True)


def defaults(new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A JSON patch that writes down what the manifest leaves to follow from the rest of it; empty for a bad one."""
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
