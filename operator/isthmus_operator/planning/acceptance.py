"""Acceptance of manifests and of later changes to them. Pure."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec, Pool
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.manifests.manifest import ManifestError, check_job_name, parse_spec

from ..render import aggregator, references
from ..render.client import ClientPods
from ..render.defaults import NONE, JobDefaults
from ..render.merge import TemplateError
from ..render.restrict import violations
from ..state.observed import Job, Observed
from ..text import plural

log = logging.getLogger(__name__)

# Fields that may change during a job's life. Any other change needs a new job.
LIVE_FIELDS = ("suspend", "backoff_limit", "active_deadline_seconds", "ttl_seconds_after_finished")


@dataclass(frozen=True)
class Rejection:
    """The reason why a manifest is not accepted."""

    reason: Reason
    message: str
    waits: bool = False  # an admin can resolve it without a change of the manifest


@dataclass(frozen=True)
class IneffectiveChange:
    """Changes of an accepted manifest that have no effect: the webhook refuses them, the reconciler ignores them."""

    cause: str
    fields: tuple[str, ...] = ()  # empty: the changed manifest as a whole is invalid

    @property
    def ignored(self) -> str:
        """Message for a change that was stored, as without the webhook, and that the operator ignores."""
        outcome = "are ignored" if self.fields else "is ignored, except for fields that may change"
        return f"{self._subject} {outcome}: {self.cause}"

    @property
    def refused(self) -> str:
        """Message for a change that the webhook refuses."""
        return f"{self._subject} {'are' if self.fields else 'is'} refused: {self.cause}"

    @property
    def _subject(self) -> str:
        return f"changes of {', '.join(self.fields)}" if self.fields else "the changed manifest is invalid and"


@dataclass(frozen=True)
class Acceptance:
    """The spec that is in force."""

    spec: FederatedJobSpec
    ineffective: IneffectiveChange | None = None

    @property
    def message(self) -> str:
        """The message of the condition Accepted; empty unless some changes are ignored."""
        return self.ineffective.ignored if self.ineffective is not None else ""


def examine(
    job: Job, observed: Observed, allowed: frozenset[str] = frozenset(), defaults: JobDefaults = NONE
) -> Acceptance | Rejection:
    """Accept or reject a manifest. An accepted spec stays in force, whatever is edited later.

    ``allowed``: exceptions for pod templates, see :mod:`..render.restrict`. ``defaults``: the admin's job defaults.
    """
    if observed.accepted is not None:
        # Users of the namespace can write the accepted spec's ConfigMap, so templates are checked again.
        if forbidden := [*_forbidden(job, observed.accepted, allowed, defaults), *observed.forbidden_references]:
            return Rejection(Reason.TEMPLATE_NOT_ALLOWED, "; ".join(forbidden), waits=True)
        try:
            return _apply_live_changes(observed.accepted, parse_spec(job.spec))
        except ManifestError as error:
            spec = _apply_live_changes(observed.accepted, _apply_valid_changes(observed.accepted, job.spec)).spec
            return Acceptance(spec, IneffectiveChange(str(error)))
    try:
        wanted = _valid_spec(job, defaults)
    except ManifestError as error:
        return Rejection(Reason.INVALID_SPEC, str(error))
    if forbidden := _forbidden(job, wanted, allowed, defaults):
        return Rejection(Reason.TEMPLATE_NOT_ALLOWED, "; ".join(forbidden))
    if observed.forbidden_references:
        return Rejection(Reason.TEMPLATE_NOT_ALLOWED, "; ".join(observed.forbidden_references), waits=True)
    for number, pool in enumerate(wanted.pools):
        if pool.hpc is None:
            continue
        field = f"spec.pools[{number}].hpc.siteRef.name"
        site = observed.sites.get(pool.hpc.site_ref.name)
        if site is None:
            message = f"{field}: there is no HPCSite {pool.hpc.site_ref.name!r}; see kubectl get hpcsites"
            return Rejection(Reason.SITE_NOT_FOUND, message, waits=True)
        if pool.hpc.site_ref.name in observed.leaving_sites:
            message = f"{field}: HPCSite {pool.hpc.site_ref.name!r} is being deleted"
            return Rejection(Reason.SITE_NOT_FOUND, message, waits=True)
        if not site.allows(job.namespace):
            message = f"{field}: HPCSite {pool.hpc.site_ref.name!r} does not allow namespace {job.namespace}"
            return Rejection(Reason.SITE_NOT_ALLOWED, message, waits=True)
    if observed.trust_problem:
        return Rejection(Reason.SIGNING_ROOT_MISSING, observed.trust_problem, waits=True)
    return Acceptance(wanted)


def _valid_spec(job: Job, defaults: JobDefaults) -> FederatedJobSpec:
    problems = check_job_name(job.name)
    if problems:
        raise ManifestError(problems)
    spec = parse_spec(job.spec)
    problems = _check_templates(job, spec, frozenset(), defaults)[0]
    if problems:
        raise ManifestError(problems)
    return spec


def _forbidden(job: Job, spec: FederatedJobSpec, allowed: frozenset[str], defaults: JobDefaults) -> list[str]:
    """Return what the templates ask for and the admin has not allowed."""
    invalid, forbidden = _check_templates(job, spec, allowed, defaults)
    templates = [("spec.aggregator.template", spec.aggregator.template)]
    templates += [
        (f"spec.pools[{number}].cloud.template", pool.cloud.template)
        for number, pool in enumerate(spec.pools)
        if pool.cloud is not None
    ]
    not_allowed = [
        f"{path}.{problem}" for path, template in templates for problem in references.not_allowed(template, allowed)
    ]
    if spec.task.code is not None:
        # The operator copies it with its own rights, not with the user's.
        named = {"configMapRef": {"name": spec.task.code.config_map_ref.name}}
        not_allowed += [f"spec.task.code.{problem}" for problem in references.not_allowed(named, allowed)]
    return [*invalid, *forbidden, *not_allowed]


def _check_templates(
    job: Job, spec: FederatedJobSpec, allowed: frozenset[str], defaults: JobDefaults
) -> tuple[list[str], list[str]]:
    """Return the errors in templates, and what they ask for that the admin has not allowed."""
    invalid: list[str] = []
    forbidden: list[str] = []
    for path, render in _templates(job, spec, defaults):
        try:
            forbidden += [f"{path}.{problem}" for problem in violations(render(), allowed)]
        except TemplateError as error:
            invalid.append(f"{path}.{error}")
        except Exception as error:
            # The CRD accepts any mapping. An unforeseen one must not break the reconciliation and the webhook without
            # a message to the user.
            log.exception("%s/%s: %s", job.namespace, job.name, path)
            invalid.append(f"{path}: no pod can be made from it: {type(error).__name__}: {error}")
    return invalid, forbidden


def _templates(
    job: Job, spec: FederatedJobSpec, defaults: JobDefaults
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the path of each non-empty pod template with a function that renders a pod from it."""
    if spec.aggregator.template:
        yield "spec.aggregator.template", lambda: aggregator.pod(job, spec, "", (), defaults)
    for number, pool in enumerate(spec.pools):
        if pool.cloud is not None and pool.cloud.template:
            yield f"spec.pools[{number}].cloud.template", partial(_client, job, spec, pool, defaults)


def _client(job: Job, spec: FederatedJobSpec, pool: Pool, defaults: JobDefaults) -> dict[str, Any]:
    return ClientPods(job, spec, pool, "", (), defaults).pod(0, 0)


def _apply_live_changes(accepted: FederatedJobSpec, wanted: FederatedJobSpec) -> Acceptance:
    spec = accepted.model_copy(update={name: getattr(wanted, name) for name in LIVE_FIELDS})
    pools, problems = _resized_pools(accepted, wanted)
    compared = spec.model_copy(update={"pools": pools})
    # A size or quorum that defaults to the replicas keeps its first value, which the aggregator knows.
    sized = [_of_size(new, old.size) for new, old in zip(pools, accepted.pools, strict=True)]
    selection = accepted.selection.model_copy(update={"min_clients": accepted.min_clients})
    spec = spec.model_copy(update={"pools": sized, "selection": selection})
    compared, wanted = _with_accepted_defaults(compared, accepted), _with_accepted_defaults(wanted, accepted)
    changed = tuple(
        f"spec.{info.alias or name}"
        for name, info in FederatedJobSpec.model_fields.items()
        if getattr(compared, name) != getattr(wanted, name)
    )
    if not changed:
        return Acceptance(spec)
    why = f"they need a new job ({'; '.join(problems)})" if problems else "they need a new job"
    return Acceptance(spec, IneffectiveChange(why, changed))


def _apply_valid_changes(accepted: FederatedJobSpec, manifest: Mapping[str, Any]) -> FederatedJobSpec:
    """Return the accepted spec with the live fields of an invalid manifest, each if it is valid by itself.

    A mistake elsewhere must not resume a suspended job, or bring back clients of a pool that was shrunk.
    """
    content = accepted.model_dump(mode="json", by_alias=True)
    spec = accepted
    for name in LIVE_FIELDS:
        field = FederatedJobSpec.model_fields[name]
        alias = field.alias or name
        content, spec = _try_change({**content, alias: manifest.get(alias, field.default)}, content, spec)
    pools = manifest.get("pools")
    for given in pools if isinstance(pools, list) else ():
        wanted = given if isinstance(given, Mapping) else {}
        resized = [
            {**pool, "replicas": wanted.get("replicas", 1)}
            if pool["hpc"] and pool["name"] == wanted.get("name")
            else pool
            for pool in content["pools"]
        ]
        content, spec = _try_change({**content, "pools": resized}, content, spec)
    return spec


def _try_change(
    changed: dict[str, Any], before: dict[str, Any], spec: FederatedJobSpec
) -> tuple[dict[str, Any], FederatedJobSpec]:
    try:
        return changed, parse_spec(changed)
    except ManifestError:
        return before, spec


def _with_accepted_defaults(spec: FederatedJobSpec, accepted: FederatedJobSpec) -> FederatedJobSpec:
    """Return the spec with the accepted values of fields that it leaves open.

    The webhook wrote them into the job when it was created; the user's own manifest still leaves them open.
    """
    clients, updates = spec.selection.min_clients, spec.stragglers.min_updates
    selection = spec.selection.model_copy(update={"min_clients": clients or accepted.min_clients})
    stragglers = spec.stragglers.model_copy(update={"min_updates": updates or accepted.min_updates})
    return spec.model_copy(update={"selection": selection, "stragglers": stragglers})


def _resized_pools(accepted: FederatedJobSpec, wanted: FederatedJobSpec) -> tuple[list[Pool], list[str]]:
    """Return the accepted pools with their wanted sizes, and the problems of sizes that are not possible."""
    resized = [_resized(pool, wanted) for pool in accepted.pools]
    pools, problems = [pool for pool, _ in resized], [problem for _, problem in resized if problem]
    trainers, quorum = accepted.model_copy(update={"pools": pools}).fewest_trainers, accepted.min_clients
    if trainers < max(quorum, accepted.min_updates):
        fewest = f"a quorum of {quorum}" if trainers < quorum else f"rounds of at least {accepted.min_updates} updates"
        problems.append(f"it was made for {fewest}, and {plural(trainers, 'client')} would train")
        return accepted.pools, problems
    return pools, problems


def _resized(pool: Pool, wanted: FederatedJobSpec) -> tuple[Pool, str]:
    """Return an accepted pool with its wanted size, and the problem if that is not possible."""
    new = next((other for other in wanted.pools if other.name == pool.name), None)
    if new is None or pool.hpc is None or new.replicas == pool.replicas:
        return pool, ""
    if new.replicas > pool.size:
        return pool, f"pool {pool.name} was made for at most {pool.size} clients, its hpc.maxReplicas"
    return pool.model_copy(update={"replicas": new.replicas}), ""


def _of_size(pool: Pool, size: int) -> Pool:
    if pool.hpc is None or pool.size == size:
        return pool
    return pool.model_copy(update={"hpc": pool.hpc.model_copy(update={"max_replicas": size})})
