"""The plan: from what is wanted and what is seen to what to do next. A pure function, and the operator's heart.

Level-triggered: it asks for the difference between the two, whatever came before, so that repeating it from any state
converges; in a state that has converged it asks for nothing.
"""

import datetime as dt

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import ConditionType, Reason
from isthmus_contracts.identities import FINALIZER
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec

from ..render.hpc import key as hpc_key
from ..render.hpc import pool_of
from ..state.job_record import AggregatorRecord, HpcRecord, Record
from ..state.observed import Job, Observed
from ..state.timestamps import parse_timestamp
from ..text import one_line, plural
from .acceptance import Acceptance, Rejection, examine
from .actions import DeleteJob, DeletePod, Emit, Plan, RecordOrphan, SaveJob
from .aggregator import AggregatorOutcome, plan_aggregator
from .base import plan_base
from .cloud_pool import plan_cloud_pool
from .context import Draft, Limits, PoolOutcome, Verdict
from .events import transition_events
from .hpc_pool import plan_cancel, plan_hpc_pool
from .readiness import assess_job
from .start_problems import warn_once
from .status import StatusDraft, condition, finished, is_true


def plan(job: Job, observed: Observed, now: dt.datetime, limits: Limits) -> Plan:
    """What to do about a job. Never raises for what users write or the cluster shows."""
    record = load_record(job)
    if job.deleted is not None:
        return _plan_deletion(Draft(job, observed, now, limits, _any_spec(job, observed), record))
    verdict = examine(job, observed, limits.allowed, limits.defaults)
    if finished(job.status):
        spec = _any_spec(job, observed) if isinstance(verdict, Rejection) else verdict.spec
        return _plan_finished(Draft(job, observed, now, limits, spec, record, requeue=limits.idle))
    if isinstance(verdict, Rejection):
        return _rejected(job, now, limits, verdict)
    draft = Draft(job, observed, now, limits, verdict.spec, record, requeue=limits.idle)
    if verdict.spec.suspend:
        return _plan_suspended(draft, verdict)
    return _plan_running(draft, verdict)


def load_record(job: Job) -> Record:
    """The job's record; if someone damaged it, as much of it as the status still tells."""
    try:
        return Record.load(job.record, job.uid)
    except ValueError:
        record = Record()
        sites = {
            pool.get("name"): ((pool.get("hpc") or {}).get("siteRef") or {}).get("name")
            for pool in job.spec.get("pools") or ()
        }
        for pool in job.status.get("pools") or ():
            site = sites.get(pool.get("name"))
            if site:
                # Of another CA, as far as we know: it is cancelled, and the next attempt gets a number of its own.
                attempt = int(pool.get("attempt", 0))
                record.hpc[pool["name"]] = HpcRecord(site, attempt=attempt, seen=True, authority="lost")
        return record


def _plan_running(draft: Draft, verdict: Acceptance) -> Plan:
    spec, status = draft.spec, StatusDraft(draft.job, draft.now)
    started = status.started()
    if draft.observed.foreign:
        base = False
        draft.wake_in(draft.limits.resync)
    else:
        base = plan_base(draft)
    aggregator = plan_aggregator(draft, base)
    pools = [
        plan_cloud_pool(draft, pool, base) if pool.cloud is not None else plan_hpc_pool(draft, pool, base)
        for pool in spec.pools
    ]
    federation = aggregator.federation
    asked = draft.observed.federation is not None
    alive = aggregator.status == "True"
    # While an aggregator that runs does not answer, what it last said stands.
    ready = federation.connected if federation is not None and asked else ({} if not alive else None)
    _common_conditions(status, verdict)
    _warn_of_pools(draft, pools)
    if draft.volume_lost:
        status.forget_rounds()
    status.federation(spec, federation)
    status.pools(pools, ready)
    message = _aggregator_condition(draft, status, aggregator)
    if ready is not None:
        _quorum_condition(status, spec, sum(ready.get(name, 0) for name in _trainers(spec)))
    end = aggregator.verdict or _impossible(draft, aggregator, pools) or _deadline(draft, started)
    if end is not None:
        status.set(ConditionType(end.outcome), True, end.reason, end.message)
        if end.outcome == "Failed":
            status.set(ConditionType.AGGREGATOR_READY, False, Reason.AGGREGATOR_FINISHED, end.message)
        status.set(ConditionType.QUORUM_REACHED, False, Reason.WAITING_FOR_CLIENTS, "the job is over")
        status.completed()
        status.phase(end.outcome, end.message)
        # The verdict is written first; the clean-up follows from it, whoever does it.
        draft.actions.clear()
        draft.wake_in(0.1)
        return _close(draft, status)
    quorum = is_true(status.content, ConditionType.QUORUM_REACHED)
    training = alive and federation is not None and (quorum or federation.current_round > 0)
    if not message and not quorum:
        message = str((condition(status.content, ConditionType.QUORUM_REACHED) or {}).get("message", ""))
    if not message and federation is not None:
        message = one_line(federation.message)
    stays = alive and federation is None and draft.job.status.get("phase") == "Running"
    status.phase("Running" if training or stays else "Starting", message)
    draft.wake_in(draft.limits.resync)
    return _close(draft, status)


def _common_conditions(status: StatusDraft, verdict: Acceptance) -> None:
    status.set(ConditionType.ACCEPTED, True, Reason.VALID, verdict.message)
    status.set(ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED)


def _warn_of_pools(draft: Draft, pools: list[PoolOutcome]) -> None:
    before = {pool.get("name"): str(pool.get("reason") or "") for pool in draft.job.status.get("pools") or ()}
    for pool in pools:
        if pool.held:
            warn_once(draft, Reason.CLIENTS_NOT_RUNNING, f"pool {pool.name}", before.get(pool.name, ""), pool.reason)


def _aggregator_condition(draft: Draft, status: StatusDraft, aggregator: AggregatorOutcome) -> str:
    """Sets AggregatorReady, and returns what a person should know of it."""
    message = aggregator.message
    if draft.observed.foreign:
        taken = ", ".join(draft.observed.foreign)
        message = f"waits for names that belong to something else: {taken}"
    elif aggregator.status == "True" and draft.observed.federation_error:
        message = f"it does not answer the operator: {draft.observed.federation_error}"
    if aggregator.held or draft.observed.foreign:
        before = condition(draft.job.status, ConditionType.AGGREGATOR_READY) or {}
        # The transition to AggregatorLost bears an event itself.
        if aggregator.reason is not Reason.AGGREGATOR_LOST or before.get("reason") == Reason.AGGREGATOR_LOST:
            warn_once(draft, aggregator.reason, "aggregator", str(before.get("message") or ""), message)
    status.set(ConditionType.AGGREGATOR_READY, aggregator.status == "True", aggregator.reason, message)
    return f"aggregator: {message}" if message else ""


def _quorum_condition(status: StatusDraft, spec: FederatedJobSpec, connected: int) -> None:
    message = f"{plural(connected, _counted(spec))} connected, {spec.min_clients} needed"
    enough = connected >= spec.min_clients
    # While it holds, the message keeps still: a thousand clients that come one by one are no thousand changes.
    if enough:
        message = f"at least {plural(spec.min_clients, _counted(spec))} connected"
    reason = Reason.ENOUGH_CLIENTS if enough else Reason.WAITING_FOR_CLIENTS
    status.set(ConditionType.QUORUM_REACHED, enough, reason, message)


def _trainers(spec: FederatedJobSpec) -> frozenset[str]:
    """The pools whose clients count towards the quorum, as they do for the aggregator: those that train."""
    return frozenset(pool.name for pool in spec.pools if pool.role == "Train")


def _counted(spec: FederatedJobSpec) -> str:
    return "client" if len(_trainers(spec)) == len(spec.pools) else "training client"


def _impossible(draft: Draft, aggregator: AggregatorOutcome, outcomes: list[PoolOutcome]) -> Verdict | None:
    """Whether too few clients can ever be there."""
    needed = max(draft.spec.min_clients, draft.spec.min_updates)
    training = _trainers(draft.spec)
    pools = [outcome for outcome in outcomes if outcome.name in training]
    possible = sum(pool.possible for pool in pools)
    if possible >= needed:
        return None
    if aggregator.status == "True" and draft.observed.federation is None:
        # It may be complete, and its clients gone for that reason: ask first.
        draft.wake_in(draft.limits.resync)
        return None
    lost = [pool for pool in pools if pool.blocked is not None]
    causes = {pool.blocked for pool in lost}
    for reason in (Reason.POLICY_DENIED, Reason.QUEUE_TIMEOUT):
        if reason in causes:
            break
    else:
        reason = Reason.QUORUM_IMPOSSIBLE
    why = "; ".join(f"pool {pool.name}: {one_line(pool.reason)}" for pool in lost if pool.reason)
    message = f"{plural(possible, _counted(draft.spec))} can still take part, {needed} are needed"
    return Verdict("Failed", reason, f"{message}; {why}" if why else message)


def _deadline(draft: Draft, started: dt.datetime) -> Verdict | None:
    seconds = draft.spec.active_deadline_seconds
    if seconds is None or not draft.reached(started + dt.timedelta(seconds=seconds)):
        return None
    return Verdict("Failed", Reason.DEADLINE_EXCEEDED, f"not complete {seconds} s after it began")


def _plan_suspended(draft: Draft, verdict: Acceptance) -> Plan:
    status = StatusDraft(draft.job, draft.now)
    if draft.observed.accepted is None and not draft.observed.foreign:
        plan_base(draft)
    # It is not lost but stopped, and crashes of the past do not count against it when it comes back.
    draft.record.aggregator = AggregatorRecord()
    stopped = _stop_pods(draft)
    settled = plan_cancel(draft, "the job is suspended")
    status.set(ConditionType.ACCEPTED, True, Reason.VALID, verdict.message)
    status.set(ConditionType.SUSPENDED, True, Reason.SUSPENDED)
    status.set(ConditionType.AGGREGATOR_READY, False, Reason.SUSPENDED)
    status.set(ConditionType.QUORUM_REACHED, False, Reason.SUSPENDED)
    status.federation(draft.spec, None)
    status.reset_start()
    status.idle_pools()
    status.phase("Suspended", "" if stopped and settled else _stopping(draft, settled))
    return _close(draft, status)


def _plan_finished(draft: Draft) -> Plan:
    """Cleans up after the end. Pods that ended by themselves stay for their logs, the volume for the model."""
    status = StatusDraft(draft.job, draft.now)
    ended = parse_timestamp(draft.job.status.get("completionTime")) or draft.now
    complete = finished(draft.job.status) is ConditionType.COMPLETE
    if not complete or draft.rested(ended, dt.timedelta(seconds=draft.limits.grace)):
        _stop_pods(draft)
        plan_cancel(draft, "the job is complete" if complete else "the job failed")
    elif any(not record.ended for record in draft.record.hpc.values()):
        _note_ended_pools(draft)
    if not any(pod.active for pod in draft.observed.pods):
        status.idle_pools()
    ttl = draft.spec.ttl_seconds_after_finished
    if ttl is not None and draft.reached(ended + dt.timedelta(seconds=ttl)):
        draft.actions.append(DeleteJob())
    return _close(draft, status)


def _note_ended_pools(draft: Draft) -> None:
    """Notes which pools ended by themselves while they may."""
    for name, record in draft.record.hpc.items():
        view = draft.observed.pools.get(name)
        if view is not None and view.attempt == record.attempt and view.ended:
            record.ended = True
    if any(not record.ended for record in draft.record.hpc.values()):
        draft.wake_in(draft.limits.resync)


def _plan_deletion(draft: Draft) -> Plan:
    job, status = draft.job, StatusDraft(draft.job, draft.now)
    if FINALIZER not in job.finalizers:
        return Plan(status=job.status, requeue=draft.limits.idle)
    assert job.deleted is not None
    _stop_pods(draft)
    others = tuple(name for name in job.finalizers if name != FINALIZER)
    if plan_cancel(draft, "the job is deleted"):
        draft.actions.append(SaveJob(finalizers=others))
        return Plan(tuple(draft.actions), job.status)
    give_up = job.deleted + dt.timedelta(seconds=draft.limits.site_give_up)
    if draft.reached(give_up):
        draft.emit("Warning", Reason.SITE_UNREACHABLE, _given_up(draft))
        draft.actions = [
            RecordOrphan(pool_of(name), record.site, hpc_key(draft.limits.cluster, job, name, record.attempt))
            for name, record in draft.record.hpc.items()
            if not record.ended
        ]
        draft.actions.append(SaveJob(finalizers=others))
        return Plan(tuple(draft.actions), job.status, tuple(draft.events))
    status.content["message"] = _stopping(draft, False)
    return _close(draft, status)


def _given_up(draft: Draft) -> str:
    """What may still run at sites, and who cancels it: where the HPCSite is gone, nobody but the site's own people."""
    left = {name: record for name, record in draft.record.hpc.items() if not record.ended}
    pools = ", ".join(f"{name} at {record.site}" for name, record in left.items())
    message = f"gave up cancelling after {draft.limits.site_give_up:g} s; it may still run: pool {pools}"
    gone = {name: record for name, record in left.items() if record.site not in draft.observed.sites}
    if not gone:
        return f"{message}; it is cancelled once the site answers"
    cluster, job = draft.limits.cluster, draft.job
    keys = ", ".join(f"isthmus-{hpc_key(cluster, job, name, record.attempt)}" for name, record in gone.items())
    sites = ", ".join(sorted({record.site for record in gone.values()}))
    return f"{message}; there is no HPCSite {sites} any more: cancel by hand at the site what is named {keys}"


def _stop_pods(draft: Draft) -> bool:
    """Deletes every pod that has not ended. Returns whether there is none."""
    running = [pod for pod in draft.observed.pods if pod.active]
    draft.actions += [DeletePod(pod.name, pod.uid) for pod in running]
    return not running


def _stopping(draft: Draft, settled: bool) -> str:
    if settled:
        return "stopping its pods"
    waits = []
    for name, record in draft.record.hpc.items():
        problem = draft.observed.problems.get(name)
        if not record.ended:
            waits.append(f"{name} at {record.site}" + (f" ({one_line(problem.message, 100)})" if problem else ""))
    return f"cancelling pool {', '.join(waits)}"


def _rejected(job: Job, now: dt.datetime, limits: Limits, rejection: Rejection) -> Plan:
    status = StatusDraft(job, now)
    status.set(ConditionType.ACCEPTED, False, rejection.reason, rejection.message)
    status.phase("Rejected", rejection.message)
    assess_job(status)
    events = transition_events(job.status, status.content)
    # A site that appears wakes its jobs; the look now and then is for a wake-up that was lost.
    requeue = min(limits.idle, 60.0) if rejection.waits else limits.idle
    return Plan(status=status.content, events=events, requeue=requeue)


def _close(draft: Draft, status: StatusDraft) -> Plan:
    """Puts the plan together: what must be remembered is written before anything is done."""
    job = draft.job
    if job.deleted is None:
        assess_job(status)
    record = draft.record.dump(job.uid)
    save = record != job.record and _differs(draft.record, job)
    finalizers, outside = None, _outside(draft)
    if job.deleted is None and FINALIZER not in job.finalizers and outside and draft.actions:
        finalizers = (*job.finalizers, FINALIZER)
    elif job.deleted is None and FINALIZER in job.finalizers and not outside:
        finalizers = tuple(name for name in job.finalizers if name != FINALIZER)  # of an earlier operator
    if save or finalizers is not None:
        draft.actions.insert(0, SaveJob(record if save else None, finalizers))
    if draft.unsaid:
        last = draft.events[-1]
        draft.events[-1] = Emit(last.type, last.reason, f"{last.message} (and {draft.unsaid} more such events)")
    events = (*transition_events(job.status, status.content), *draft.events)
    return Plan(tuple(draft.actions), status.content, events, draft.requeue)


def _outside(draft: Draft) -> bool:
    """Whether anything of the job is outside of the cluster, or may come to be: what is inside goes with the job by its
    owner references, and a finalizer would only keep a namespace from going whose roles went first."""
    return bool(draft.record.hpc) or any(pool.hpc is not None for pool in draft.spec.pools)


def _differs(record: Record, job: Job) -> bool:
    """Whether the job's annotation tells something else, or nothing at all any more."""
    try:
        return record != Record.load(job.record, job.uid)
    except ValueError:
        return True


def _any_spec(job: Job, observed: Observed) -> FederatedJobSpec:
    """A spec for a job that is going: its content hardly matters any more."""
    if observed.accepted is not None:
        return observed.accepted
    try:
        return parse_spec(job.spec)
    except ManifestError:
        return parse_spec({"rounds": 1, "task": {"image": "none", "command": ["none"]},
                           "pools": [{"name": "none", "cloud": {}}]})  # fmt: skip
