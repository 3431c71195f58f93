"""HPC pools, run through the site's bridge.

Each array of a pool (see :mod:`.hpc_arrays`) runs one attempt at a time. A successor is requested some time before the
time limit ends the current one. The states of an attempt (:class:`..state.job_record.ArrayState`):

=============  ==================================================================  =========================
State          Event                                                               Next state
=============  ==================================================================  =========================
Waiting        the request is made                                                 Requested
Waiting        the pool is cancelled                                               Ended
Requested      the site reports the pool                                           Accepted
Requested      the pool is cancelled                                               Withdrawing
Accepted       a task leaves the queue                                             Ran
Accepted, Ran  the pool is cancelled                                               Cancelling
Withdrawing    the site reports the pool                                           Cancelling
Withdrawing    the site denies access: it never ran the pool                       Ended
Withdrawing,   the site reports the end, and the pool is still to be cancelled     Ended
Cancelling
any            the site reports the end, and the job is not over                   Waiting, the next attempt
=============  ==================================================================  =========================

No next attempt follows an array that is given up (``setback.given_up``) or retiring.
"""

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any

from isthmus_contracts.api.federated_job import HpcPool, Pool
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.process import backoff

from .. import names
from ..render import hpc as render
from ..state.job_record import ArrayKey, ArrayRecord, ArrayState, Setback, Submission
from ..state.observed import PoolPhase, PoolView, ProblemKind
from ..text import last_lines, one_line
from .actions import CancelPool, EnsurePool, RenewCredentials
from .context import PlanContext, PoolOutcome
from .hpc_arrays import arrays_of, current, next_attempt, replace_array, resize, retiring_arrays_of

_FIRST_DELAY = 10  # seconds before an array is submitted again after a failure; doubled each time
_LONGEST_DELAY = 300
_AFTER_DISPLACEMENT = 60
_WAITING = (PoolPhase.SUBMITTING, PoolPhase.PENDING, PoolPhase.UNKNOWN)
# Slurm's reasons for a wait that does not end by itself, and their meaning.
_NEVER = {
    "PartitionTimeLimit": "its time limit is above the partition's",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows",
    "BadConstraints": "no node of the partition has what it asks for",
    "InvalidAccount": "Slurm no longer knows the account",
    "InvalidQOS": "Slurm no longer knows the QOS",
    "DependencyNeverSatisfied": "it depends on a job that failed",
    "JobHeldAdmin": "the site's admin holds it",
    "JobHeldUser": "it is held",
    "launch failed requeued held": "its node could not start it (a failed prolog); the site's admin must release it",
}
_LONGEST_STUCK = 3600
# The state after the site has reported an attempt.
_REPORTED = {ArrayState.REQUESTED: ArrayState.ACCEPTED, ArrayState.WITHDRAWING: ArrayState.CANCELLING}
# How long before a time limit the next attempt is requested: a multiple of the last time in the queue, plus seconds.
_QUEUE_MARGIN = 1.5
_SHORTEST_LEAD = 120.0


def plan_hpc_pool(context: PlanContext, pool: Pool, ready_to_start: bool) -> PoolOutcome:
    """Plan one HPC pool of a job that is to run."""
    resize(context, pool)
    for key, array in arrays_of(context.record, pool.name):
        if ready_to_start and _ends_soon(context, pool, array, current(context, key)):
            replace_array(context, key)
    for key, array in retiring_arrays_of(context.record, pool.name):
        _retire(context, pool, key, array)
    keys = [key for key, _ in arrays_of(context.record, pool.name)] or [ArrayKey(pool.name)]
    return _combine(context, pool, [_plan_array(context, pool, key, ready_to_start) for key in keys])


def _plan_array(context: PlanContext, pool: Pool, key: ArrayKey, ready_to_start: bool) -> PoolOutcome:
    array, view = context.record.hpc.get(key), current(context, key)
    if array is not None and view is not None:
        _note(context, pool, array, view)
    if array is not None and not array.given_up:
        _advance(context, pool, key, array, view)
        view = current(context, key)
    if array is not None:
        _renew(context, pool, key, array)
    if array is not None and array.given_up:
        _cancel(context, key, array, array.setback.message)
    elif ready_to_start:
        array = _ensure(context, pool, key, array, view)
    return _outcome(context, pool, key, array, view)


def _ends_soon(context: PlanContext, pool: Pool, array: ArrayRecord, view: PoolView | None) -> bool:
    """Return whether to queue a successor now; if it is too early, schedule a pass for the time to do so.

    The successor is queued before the time limit, by the last waiting time in the queue plus a margin.
    """
    assert pool.hpc is not None
    if view is None or view.phase is not PoolPhase.RUNNING or not view.ends_at or array.cancelling or array.given_up:
        return False
    federation = context.observed.federation
    if federation is not None and federation.total_rounds and federation.completed_rounds >= federation.total_rounds:
        return False
    limit = pool.hpc.time_limit_seconds
    waited = max(0.0, view.ends_at - limit - view.submitted_at)
    lead = min(waited * _QUEUE_MARGIN + _SHORTEST_LEAD, limit / 2)
    return context.reached(dt.datetime.fromtimestamp(view.ends_at - lead, dt.UTC))


def _retire(context: PlanContext, pool: Pool, key: ArrayKey, array: ArrayRecord) -> None:
    """Cancel a retiring array that the manifest no longer wants; let any other run until it ends."""
    context.requeue_after(context.options.resync)
    if array.first >= pool.replicas:
        _cancel(context, key, array, "the pool was shrunk")
    elif array.cancelling:
        _cancel(context, key, array, "the job was suspended")
    else:
        _renew(context, pool, key, array)


def _renew(context: PlanContext, pool: Pool, key: ArrayKey, array: ArrayRecord) -> None:
    """Send the pool's renewed certificate to an array that waits or runs at the site."""
    secret = names.pool_tls(context.job, pool.name)
    wanted, view = context.observed.certificates.get(secret, ""), current(context, key)
    request, submission = _request_key(context, key, array), array.submission
    submission.certificate = context.observed.delivered.get(request, submission.certificate)
    if not wanted or wanted == submission.certificate or array.cancelling or array.given_up or array.ended:
        return
    if view is None or view.ended or view.phase is PoolPhase.ABSENT:
        return
    context.requeue_after(context.options.resync)
    if context.may_call_site(key):
        context.actions.append(RenewCredentials(key, array.site, request, secret))


def _request_key(context: PlanContext, key: ArrayKey, array: ArrayRecord) -> str:
    return render.key(context.options.cluster, context.job, key.pool, array.attempt)


def _combine(context: PlanContext, pool: Pool, outcomes: list[PoolOutcome]) -> PoolOutcome:
    """Return the outcome of a pool from those of its arrays."""
    retiring = retiring_arrays_of(context.record, pool.name)
    views = [view for key, _ in retiring if (view := current(context, key)) is not None and not view.ended]
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
    # While the current attempt runs, its clients are there even if the next attempt is not possible.
    whole.possible = min(pool.replicas, max(whole.possible, sum(view.running for view in views)))
    return whole


def plan_cancel(context: PlanContext, reason: str) -> bool:
    """Cancel every pool of the job, including those that its spec no longer names. Return True once all are gone."""
    ended = [_cancel(context, key, array, reason) for key, array in context.record.hpc.items()]
    return all(ended)


def site_problem(context: PlanContext, pool: HpcPool) -> Reason | None:
    """Return why the pool's site cannot be used; None if it can."""
    site = context.observed.sites.get(pool.site_ref.name)
    if site is None or pool.site_ref.name in context.observed.leaving_sites:
        return Reason.SITE_NOT_FOUND
    if not site.allows(context.job.namespace):
        return Reason.SITE_NOT_ALLOWED
    return None


def _note(context: PlanContext, pool: Pool, array: ArrayRecord, view: PoolView) -> None:
    """Update the array's state from the site's report, and give the array up if it waits too long in the queue."""
    if view.phase is not PoolPhase.ABSENT:
        array.state = _REPORTED.get(array.state, array.state)
    if view.running + view.succeeded + view.failed and array.state is ArrayState.ACCEPTED:
        array.state = ArrayState.RAN
    assert pool.hpc is not None
    since = view.submitted_at or array.submission.requested_at
    waits = view.phase in _WAITING and array.state is ArrayState.ACCEPTED and since > 0
    if waits and not array.given_up:
        limit = pool.hpc.max_queue_seconds
        if view.phase is PoolPhase.PENDING and view.reason in _NEVER:
            limit = min(limit, _LONGEST_STUCK)
        if context.reached(dt.datetime.fromtimestamp(since, dt.UTC) + dt.timedelta(seconds=limit)):
            why = _queue_reason(view)
            message = f"waited in the queue for more than {limit} s" + (f" ({why})" if why else "")
            array.setback = Setback(message, array.setback.retry_at, Reason.QUEUE_TIMEOUT)
            context.emit("Warning", Reason.QUEUE_TIMEOUT, f"pool {pool.name} {message}")


def _advance(context: PlanContext, pool: Pool, key: ArrayKey, array: ArrayRecord, view: PoolView | None) -> None:
    """Prepare the next attempt once the current one has ended."""
    authority, cancelled = context.observed.authority, array.cancelling
    signed_by = array.submission.authority
    if authority and signed_by and signed_by != authority and not array.ended:
        # Its tasks hold certificates of a CA that no longer exists, so none can join.
        _cancel(context, key, array, "the job has a new CA")
    elif cancelled:
        # Cancelled by a suspension that is over: the next attempt follows its end.
        _cancel(context, key, array, "the job was suspended")
    if not array.ended and (view is None or not view.ended):
        return
    if view is not None and not cancelled:
        _count_end(context, pool, array, view)
        if array.given_up:
            return
    array.attempt = next_attempt(context.record, pool.name)
    array.state, array.submission = ArrayState.WAITING, Submission()


def _count_end(context: PlanContext, pool: Pool, array: ArrayRecord, view: PoolView) -> None:
    """Count an attempt that ended by itself, and decide when the next one may follow."""
    now = int(context.now.timestamp())
    if view.timed_out:
        # Not a failure: the training takes longer than one allocation.
        message = f"pool {pool.name} is submitted again: it reached its time limit"
        context.emit("Normal", Reason.TIME_LIMIT_REACHED, message)
    elif view.displaced:
        # As with an evicted pod, the site took the nodes; the client did not fail.
        words = one_line(view.message) or "the site took its nodes"
        array.setback = Setback(words, now + _AFTER_DISPLACEMENT)
        message = f"pool {pool.name} is submitted again in {_AFTER_DISPLACEMENT} s: {words}"
        context.emit("Warning", Reason.PREEMPTED, message)
    else:
        array.failures += 1
        words = _failure(view) or f"its tasks ended ({view.phase.lower()}) before the training was complete"
        if array.failures > context.spec.backoff_limit:
            array.setback = Setback(f"out of restarts: {words}", array.setback.retry_at, Reason.CLIENT_FAILED)
            context.emit("Warning", Reason.CLIENT_FAILED, f"pool {pool.name} is {array.setback.message}")
            return
        delay = round(backoff.delay(array.failures, _FIRST_DELAY, _LONGEST_DELAY))
        array.setback = Setback(one_line(words), now + delay)
        message = f"pool {pool.name} is submitted again in {delay} s: {words}"
        context.emit("Warning", Reason.CLIENT_FAILED, message)


def _ensure(
    context: PlanContext, pool: Pool, key: ArrayKey, array: ArrayRecord | None, view: PoolView | None
) -> ArrayRecord | None:
    """Request the array from its site unless it is there already. Return its record, once there is one."""
    hpc, problem = pool.hpc, context.observed.problems.get(key)
    assert hpc is not None
    if view is not None and view.phase is not PoolPhase.ABSENT:
        context.requeue_after(context.options.resync)
        return array
    if array is not None and array.cancelling:
        return array
    # An attempt that was requested and has not been looked up since is looked up first.
    unknown = array is not None and array.at_site and view is None
    if unknown and (problem is None or problem.kind is ProblemKind.UNREACHABLE):
        context.requeue_after(context.options.resync)
        return array
    address = render.endpoint(context.spec, context.observed)
    if site_problem(context, hpc) is not None or not address:
        context.requeue_after(context.options.resync)
        return array
    if not context.may_call_site(key) or (array is not None and not _paused_enough(context, array)):
        return array
    if array is None:
        array = context.record.hpc[key] = ArrayRecord(hpc.site_ref.name, size=pool.replicas)
    secret = names.pool_tls(context.job, pool.name)
    array.submission = Submission(
        array.submission.requested_at or int(context.now.timestamp()),
        context.observed.authority,
        context.observed.certificates.get(secret, ""),
    )
    if array.state is ArrayState.WAITING:
        array.state = ArrayState.REQUESTED
    context.actions.append(
        EnsurePool(
            array=key,
            site=array.site,
            key=_request_key(context, key, array),
            secret=secret,
            spec=render.pool_spec(context.job, context.spec, pool, array, address, _via_bridge(context, hpc)),
            code=names.code(context.job.name) if context.spec.task.code is not None else "",
        )
    )
    context.requeue_after(context.options.resync)
    return array


def _paused_enough(context: PlanContext, array: ArrayRecord) -> bool:
    # A time further ahead than the longest pause was stored before a clock was set back.
    retry_at = array.setback.retry_at
    too_far = retry_at > context.now.timestamp() + _LONGEST_DELAY
    return too_far or context.reached(dt.datetime.fromtimestamp(retry_at, dt.UTC))


def _via_bridge(context: PlanContext, hpc: HpcPool) -> bool:
    site = context.observed.sites.get(hpc.site_ref.name)
    return site is not None and site.aggregator_access == "ViaBridge"


def _cancel(context: PlanContext, key: ArrayKey, array: ArrayRecord, reason: str) -> bool:
    """Cancel the array's current attempt. Return True once nothing of it is left at the site."""
    view, problem = current(context, key), context.observed.problems.get(key)
    there = view is not None and view.phase is not PoolPhase.ABSENT
    never_requested = array.state is ArrayState.WAITING and not there
    reported_end = view is not None and view.ended
    # A site that never confirmed the attempt and denies access has never run it.
    denied = problem is not None and problem.kind is ProblemKind.DENIED and not array.confirmed
    if array.ended or never_requested or reported_end or denied:
        array.state = ArrayState.ENDED
        return True
    array.state = ArrayState.CANCELLING if array.confirmed or there else ArrayState.WITHDRAWING
    context.requeue_after(context.options.resync)
    if context.may_call_site(key):
        context.actions.append(CancelPool(key, array.site, _request_key(context, key, array), one_line(reason)))
    return False


def _outcome(
    context: PlanContext, pool: Pool, key: ArrayKey, array: ArrayRecord | None, view: PoolView | None
) -> PoolOutcome:
    assert pool.hpc is not None
    size = array.size if array is not None else pool.replicas
    outcome = PoolOutcome(pool.name, desired=size, possible=size)
    outcome.attempt = array.attempt if array is not None else 0
    problem = context.observed.problems.get(key)
    if view is not None:
        outcome.queued, outcome.failed = view.queued, view.failed
        outcome.jobs = [view.job_id] if view.job_id else []
        outcome.reason = _failure(view) or _queue_reason(view)
    else:
        # The site's report is missing, which does not mean that the pool is gone: keep the last one.
        shown: Iterable[Mapping[str, Any]] = context.job.status.get("pools") or ()
        before: Mapping[str, Any] = next((item for item in shown if item.get("name") == pool.name), {})
        outcome.jobs = list(before.get("jobs", ()))
        shown_queued = int(before.get("queued", 0)) if array is not None and not array.ended else 0
        outcome.queued = min(shown_queued, size)
        # The end of the previous attempt, until there is news of this one.
        outcome.reason = array.setback.message if array is not None else ""
    no_site = site_problem(context, pool.hpc)
    if array is not None and array.given_up:
        outcome.possible, outcome.blocked = 0, array.given_up
        outcome.reason = f"{array.given_up}: {array.setback.message}"
        outcome.failed = max(outcome.failed, 0 if view is not None and not view.ended else size)
    elif problem is not None and problem.kind is not ProblemKind.UNREACHABLE:
        if array is None or not array.confirmed:
            outcome.possible, outcome.blocked = 0, Reason.POLICY_DENIED
        # Otherwise only the lookup was denied, and the pool that the site accepted keeps running.
        outcome.reason = f"{Reason.POLICY_DENIED}: {problem.message}"
    elif problem is not None:
        # The site's condition tells a missing tunnel from a missing answer; to the pool both mean that it must wait.
        denied = problem.reason is Reason.POLICY_DENIED
        outcome.reason = f"{Reason.POLICY_DENIED if denied else Reason.SITE_UNREACHABLE}: {problem.message}"
    elif no_site is not None:
        going = " is being deleted" if pool.hpc.site_ref.name in context.observed.leaving_sites else ""
        outcome.reason = f"{no_site}: HPCSite {pool.hpc.site_ref.name}{going}"
    elif array is None and not render.endpoint(context.spec, context.observed):
        outcome.reason = "waits for the address at which the aggregator can be reached"
    last_attempt = array is not None and array.failures >= context.spec.backoff_limit
    if last_attempt and view is not None and view.phase in (PoolPhase.PENDING, PoolPhase.RUNNING):
        # A task that is lost now is not started again.
        outcome.possible = min(outcome.possible, view.queued + view.running)
    return outcome


def _failure(view: PoolView) -> str:
    """Return the last lines of a failed task or, if no task ran, the message of the site or of Slurm."""
    if view.failed and view.failure:
        return last_lines(view.failure)
    return one_line(view.message) if view.phase is PoolPhase.FAILED else ""


def _queue_reason(view: PoolView) -> str:
    """Return why a pool waits: Slurm's reason, or what keeps the site from submitting it."""
    if view.phase in (PoolPhase.UNKNOWN, PoolPhase.SUBMITTING) or not view.queued or not view.reason:
        return one_line(view.message)
    if view.reason in _NEVER:
        return f"{view.reason}: {_NEVER[view.reason]}"
    if not view.expected_start:
        return view.reason
    start = dt.datetime.fromtimestamp(view.expected_start, dt.UTC)
    return f"{view.reason} (expected start {start:%Y-%m-%dT%H:%MZ})"
