"""HPC pools, by way of the site's bridge: each part of a pool (:mod:`.parts`) one attempt at a time, the next of which
is asked for some time before the time limit ends the present one."""

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any

from isthmus_contracts.api.federated_job import HpcPool, Pool
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.process import backoff

from .. import names
from ..render import hpc as render
from ..state.job_record import HpcRecord
from ..state.observed import PoolPhase, PoolView, ProblemKind
from ..text import last_lines, one_line
from .actions import CancelPool, EnsurePool, RenewCredentials
from .context import PlanContext, PoolOutcome
from .hpc_arrays import current, leaving_parts_of, next_attempt, parts_of, replace_array, resize

_FIRST_DELAY = 10  # seconds before an array is submitted anew; doubled each time
_LONGEST_DELAY = 300
_AFTER_DISPLACEMENT = 60
_WAITING = (PoolPhase.SUBMITTING, PoolPhase.PENDING, PoolPhase.UNKNOWN)
# Slurm's reasons for a wait that does not end by itself, and what would end it.
_NEVER = {
    "PartitionTimeLimit": "its time limit is above the partition's",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows",
    "BadConstraints": "no node of the partition has what it asks for",
    "InvalidAccount": "Slurm does not know the account any more",
    "InvalidQOS": "Slurm does not know the QOS any more",
    "DependencyNeverSatisfied": "it depends on a job that failed",
    "JobHeldAdmin": "the site's admin holds it",
    "JobHeldUser": "it is held",
    "launch failed requeued held": "its node could not start it (a failed prolog); the site's admin must release it",
}
_LONGEST_STUCK = 3600
# How long before a time limit the next attempt is asked for: so many times what the queue took, and so many seconds.
_QUEUE_MARGIN = 1.5
_SHORTEST_LEAD = 120.0


def plan_hpc_pool(context: PlanContext, pool: Pool, ready_to_start: bool) -> PoolOutcome:
    """Plans one HPC pool of a job that shall run."""
    resize(context, pool)
    for part, entry in parts_of(context.record, pool.name):
        if ready_to_start and _ends_soon(context, pool, entry, current(context, part)):
            replace_array(context, pool.name, part)
    for part, entry in leaving_parts_of(context.record, pool.name):
        _leave(context, pool, part, entry)
    parts = [part for part, _ in parts_of(context.record, pool.name)] or [pool.name]
    return _combine(context, pool, [_plan_part(context, pool, part, ready_to_start) for part in parts])


def _plan_part(context: PlanContext, pool: Pool, part: str, ready_to_start: bool) -> PoolOutcome:
    record, view = context.record.hpc.get(part), current(context, part)
    if record is not None and view is not None:
        _note(context, pool, record, view)
    if record is not None and not record.over:
        _advance(context, pool, part, record, view)
        view = current(context, part)
    if record is not None:
        _renew(context, pool, part, record)
    if record is not None and record.over:
        _settle(context, part, record, record.message)
    elif ready_to_start:
        record = _ensure(context, pool, part, record, view)
    return _outcome(context, pool, part, record, view)


def _ends_soon(context: PlanContext, pool: Pool, record: HpcRecord, view: PoolView | None) -> bool:
    """Return whether to queue for the next array: as long before the end as the queue took, and some more."""
    assert pool.hpc is not None
    if view is None or view.phase is not PoolPhase.RUNNING or not view.ends_at or record.cancelling or record.over:
        return False
    said = context.observed.federation
    if said is not None and said.total_rounds and said.completed_rounds >= said.total_rounds:
        return False
    limit = pool.hpc.time_limit_seconds
    waited = max(0.0, view.ends_at - limit - view.submitted_at)
    lead = min(waited * _QUEUE_MARGIN + _SHORTEST_LEAD, limit / 2)
    return context.reached(dt.datetime.fromtimestamp(view.ends_at - lead, dt.UTC))


def _leave(context: PlanContext, pool: Pool, part: str, record: HpcRecord) -> None:
    """Looks after a part that is not started again: what the manifest no longer wants is ended, the rest ends."""
    context.requeue_after(context.options.resync)
    if record.first >= pool.replicas:
        _settle(context, part, record, "the pool was shrunk")
    elif record.cancelling:
        _settle(context, part, record, "the job was suspended")
    else:
        _renew(context, pool, part, record)


def _renew(context: PlanContext, pool: Pool, part: str, record: HpcRecord) -> None:
    """Has what waits or runs at the site get its pool's certificate when that is renewed."""
    secret = names.pool_tls(context.job, pool.name)
    wanted, view = context.observed.certificates.get(secret, ""), current(context, part)
    key = render.key(context.options.cluster, context.job, part, record.attempt)
    record.certificate = context.observed.delivered.get(key, record.certificate)
    if not wanted or wanted == record.certificate or record.cancelling or record.over or record.ended:
        return
    if view is None or view.ended or view.phase is PoolPhase.ABSENT:
        return
    context.requeue_after(context.options.resync)
    if context.may_call_site(part):
        context.actions.append(RenewCredentials(part, record.site, key, secret))


def _combine(context: PlanContext, pool: Pool, outcomes: list[PoolOutcome]) -> PoolOutcome:
    """Return what the parts come to."""
    leaving = leaving_parts_of(context.record, pool.name)
    views = [view for part, _ in leaving if (view := current(context, part)) is not None and not view.ended]
    if len(outcomes) == 1 and not views:
        return outcomes[0]
    whole = PoolOutcome(pool.name, desired=pool.replicas)
    for outcome in outcomes:
        whole.queued += outcome.queued
        whole.failed += outcome.failed
        whole.possible += outcome.possible
        whole.reason = whole.reason or outcome.reason
        whole.blocked = whole.blocked or outcome.blocked
        whole.attempt = max(whole.attempt, outcome.attempt)
        whole.jobs += [job for job in outcome.jobs if job not in whole.jobs]
    whole.jobs += [view.job_id for view in views if view.job_id and view.job_id not in whole.jobs]
    # While the present attempt runs, its clients are there whatever becomes of the next.
    whole.possible = min(pool.replicas, max(whole.possible, sum(view.running for view in views)))
    return whole


def plan_cancel(context: PlanContext, reason: str) -> bool:
    """Ends every pool of the job, also those that its spec no longer names. Returns whether nothing is left of any."""
    settled = [_settle(context, name, record, reason) for name, record in context.record.hpc.items()]
    return all(settled)


def wants_site(context: PlanContext, pool: HpcPool) -> Reason | None:
    """Return why the pool's site cannot be used, if so."""
    site = context.observed.sites.get(pool.site_ref.name)
    if site is None or pool.site_ref.name in context.observed.leaving_sites:
        return Reason.SITE_NOT_FOUND
    if not site.allows(context.job.namespace):
        return Reason.SITE_NOT_ALLOWED
    return None


def _note(context: PlanContext, pool: Pool, record: HpcRecord, view: PoolView) -> None:
    """Remembers what later passes need to know of this attempt."""
    if view.phase is not PoolPhase.ABSENT:
        record.seen = True
    if view.running + view.succeeded + view.failed:
        record.ran = True
    assert pool.hpc is not None
    since = view.submitted_at or record.asked_at
    waits = view.phase in _WAITING and not record.ran and not record.cancelling and since > 0
    if waits and not record.over:
        limit = pool.hpc.max_queue_seconds
        if view.phase is PoolPhase.PENDING and view.reason in _NEVER:
            limit = min(limit, _LONGEST_STUCK)
        if context.reached(dt.datetime.fromtimestamp(since, dt.UTC) + dt.timedelta(seconds=limit)):
            record.over = Reason.QUEUE_TIMEOUT
            why = _queue_reason(view)
            record.message = f"waited in the queue for more than {limit} s" + (f" ({why})" if why else "")
            context.emit("Warning", Reason.QUEUE_TIMEOUT, f"pool {pool.name} {record.message}")


def _advance(context: PlanContext, pool: Pool, part: str, record: HpcRecord, view: PoolView | None) -> None:
    """Goes on to the next attempt once this one is over."""
    authority = context.observed.authority
    if authority and record.authority and record.authority != authority and not record.ended:
        # Its tasks hold certificates of a CA that is gone: none can join.
        _settle(context, part, record, "the job's certificates were made anew")
    elif record.cancelling and not record.ended:
        # Asked to end (by a suspension that is over by now): it does, and the next attempt follows.
        _settle(context, part, record, "the job was suspended")
    if not record.ended and (view is None or not view.ended):
        return
    if not record.cancelling and view is not None and view.timed_out:
        # No failure of its own: training takes longer than one allocation.
        context.emit(
            "Normal", Reason.TIME_LIMIT_REACHED, f"pool {pool.name} is submitted anew: its time limit ended it"
        )
    elif not record.cancelling and view is not None and view.displaced:
        # As an evicted pod: the site took the nodes, and the client did nothing wrong.
        record.retry_at = int(context.now.timestamp()) + _AFTER_DISPLACEMENT
        record.message = words = one_line(view.message) or "the site took its nodes"
        context.emit(
            "Warning", Reason.PREEMPTED, f"pool {pool.name} is submitted again in {_AFTER_DISPLACEMENT} s: {words}"
        )
    elif not record.cancelling and view is not None:
        record.failures += 1
        words = _failure(view) or f"its tasks ended ({view.phase.lower()}) before the training was complete"
        if record.failures > context.spec.backoff_limit:
            record.over, record.message = Reason.CLIENT_FAILED, f"out of restarts: {words}"
            context.emit("Warning", Reason.CLIENT_FAILED, f"pool {pool.name} is {record.message}")
            return
        pause = round(backoff.delay(record.failures, _FIRST_DELAY, _LONGEST_DELAY))
        record.retry_at = int(context.now.timestamp()) + pause
        record.message = one_line(words)
        context.emit("Warning", Reason.CLIENT_FAILED, f"pool {pool.name} is submitted anew in {pause} s: {words}")
    record.attempt = next_attempt(context.record, pool.name)
    record.seen = record.ran = record.cancelling = record.ended = False
    record.authority, record.asked_at = "", 0


def _ensure(
    context: PlanContext, pool: Pool, part: str, record: HpcRecord | None, view: PoolView | None
) -> HpcRecord | None:
    hpc, problem = pool.hpc, context.observed.problems.get(part)
    assert hpc is not None
    if view is not None and view.phase is not PoolPhase.ABSENT:
        context.requeue_after(context.options.resync)
        return record
    if record is not None and record.cancelling:
        return record
    # An attempt that was asked for and has not been looked up since is looked up first.
    unknown = record is not None and record.authority != "" and view is None
    if unknown and (problem is None or problem.kind is ProblemKind.UNREACHABLE):
        context.requeue_after(context.options.resync)
        return record
    address = render.endpoint(context.spec, context.observed)
    if wants_site(context, hpc) is not None or not address:
        context.requeue_after(context.options.resync)
        return record
    if not context.may_call_site(part) or (record is not None and not _paused_enough(context, record)):
        return record
    if record is None:
        record = context.record.hpc[part] = HpcRecord(hpc.site_ref.name, size=pool.replicas)
    record.authority = context.observed.authority
    record.asked_at = record.asked_at or int(context.now.timestamp())
    record.certificate = context.observed.certificates.get(names.pool_tls(context.job, pool.name), "")
    context.actions.append(
        EnsurePool(
            pool=part,
            site=record.site,
            key=render.key(context.options.cluster, context.job, part, record.attempt),
            secret=names.pool_tls(context.job, pool.name),
            spec=render.pool_spec(context.job, context.spec, pool, record, address, _via_bridge(context, hpc)),
            code=names.code(context.job.name) if context.spec.task.code is not None else "",
        )
    )
    context.requeue_after(context.options.resync)
    return record


def _paused_enough(context: PlanContext, record: HpcRecord) -> bool:
    # A moment further away than any pause is long was noted before a clock was put back.
    too_far = record.retry_at > context.now.timestamp() + _LONGEST_DELAY
    return too_far or context.reached(dt.datetime.fromtimestamp(record.retry_at, dt.UTC))


def _via_bridge(context: PlanContext, hpc: HpcPool) -> bool:
    site = context.observed.sites.get(hpc.site_ref.name)
    return site is not None and site.aggregator_access == "ViaBridge"


def _settle(context: PlanContext, name: str, record: HpcRecord, reason: str) -> bool:
    """Has the site end this attempt. Returns whether nothing of it is left."""
    view, problem = current(context, name), context.observed.problems.get(name)
    if record.ended:
        return True
    there = view is not None and view.phase is not PoolPhase.ABSENT
    if not record.authority and not record.seen and not there:
        # Announced, and not asked for yet.
        record.ended = record.cancelling = True
        return True
    if view is not None and view.ended:
        record.ended = True
        return True
    if problem is not None and problem.kind is ProblemKind.DENIED and not record.seen:
        # The site has never run it, and does not let us speak of it.
        record.ended = True
        return True
    record.cancelling = True
    context.requeue_after(context.options.resync)
    if context.may_call_site(name):
        key = render.key(context.options.cluster, context.job, name, record.attempt)
        context.actions.append(CancelPool(name, record.site, key, one_line(reason)))
    return False


def _outcome(
    context: PlanContext, pool: Pool, part: str, record: HpcRecord | None, view: PoolView | None
) -> PoolOutcome:
    assert pool.hpc is not None
    size = record.size if record is not None else pool.replicas
    outcome = PoolOutcome(pool.name, desired=size, possible=size)
    outcome.attempt = record.attempt if record is not None else 0
    problem = context.observed.problems.get(part)
    if view is not None:
        outcome.queued, outcome.failed = view.queued, view.failed
        outcome.jobs = [view.job_id] if view.job_id else []
        outcome.reason = _failure(view) or _queue_reason(view)
    else:
        # Out of sight is not gone: show what was last seen.
        shown: Iterable[Mapping[str, Any]] = context.job.status.get("pools") or ()
        before: Mapping[str, Any] = next((item for item in shown if item.get("name") == pool.name), {})
        outcome.jobs = list(before.get("jobs", ()))
        shown_queued = int(before.get("queued", 0)) if record is not None and not record.ended else 0
        outcome.queued = min(shown_queued, size)
        # Why the attempt before this one ended, until there is news of this one.
        outcome.reason = record.message if record is not None else ""
    site_problem = wants_site(context, pool.hpc)
    if record is not None and record.over:
        outcome.possible, outcome.blocked = 0, Reason(record.over)
        outcome.reason = f"{record.over}: {record.message}"
        outcome.failed = max(outcome.failed, 0 if view is not None and not view.ended else size)
    elif problem is not None and problem.kind is not ProblemKind.UNREACHABLE:
        if record is None or not record.seen:
            outcome.possible, outcome.blocked = 0, Reason.POLICY_DENIED
        # Else only the question was denied: what the site has taken on goes on there.
        outcome.reason = f"{Reason.POLICY_DENIED}: {problem.message}"
    elif problem is not None:
        outcome.reason = f"{problem.reason}: {problem.message}"
    elif site_problem is not None:
        going = " is being deleted" if pool.hpc.site_ref.name in context.observed.leaving_sites else ""
        outcome.reason = f"{site_problem}: HPCSite {pool.hpc.site_ref.name}{going}"
    elif record is None and not render.endpoint(context.spec, context.observed):
        outcome.reason = "waits for the address at which the aggregator can be reached"
    last_attempt = record is not None and record.failures >= context.spec.backoff_limit
    if last_attempt and view is not None and view.phase in (PoolPhase.PENDING, PoolPhase.RUNNING):
        # A task that is lost now stays lost.
        outcome.possible = min(outcome.possible, view.queued + view.running)
    return outcome


def _failure(view: PoolView) -> str:
    """Returns the last lines of a failed task or, where none ran, the words of the site or of Slurm."""
    if view.failed and view.failure:
        return last_lines(view.failure)
    return one_line(view.message) if view.phase is PoolPhase.FAILED else ""


def _queue_reason(view: PoolView) -> str:
    """Returns why a pool waits: Slurm's reason, or what keeps the site from submitting it."""
    if view.phase in (PoolPhase.UNKNOWN, PoolPhase.SUBMITTING) or not view.queued or not view.reason:
        return one_line(view.message)
    if view.reason in _NEVER:
        return f"{view.reason}: {_NEVER[view.reason]}"
    if not view.expected_start:
        return view.reason
    start = dt.datetime.fromtimestamp(view.expected_start, dt.UTC)
    return f"{view.reason} (expected start {start:%Y-%m-%dT%H:%MZ})"
