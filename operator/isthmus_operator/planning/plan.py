"""The plan: a pure function from the wanted and the observed state to the next actions, the core of the operator.

It is level-triggered: the actions follow from the difference between the two states, not from earlier passes. Repeating
it from any state converges, and a converged state needs no actions.
"""

import datetime as dt

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import ConditionType, Reason
from isthmus_contracts.identities import FINALIZER
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec

from .. import names
from ..render.hpc import key as hpc_key
from ..state.job_record import AggregatorRecord, ArrayState
from ..state.observed import Job, Observed
from ..state.timestamps import parse_timestamp
from ..text import one_line, plural
from .acceptance import Acceptance, Rejection, examine
from .actions import DeleteJob, DeletePod, Emit, Plan, RecordOrphan, SaveJob
from .aggregator import AggregatorOutcome, plan_aggregator
from .base import plan_base
from .cloud_pool import plan_cloud_pool
from .context import JobResult, PlanContext, PlanOptions, PoolOutcome
from .events import transition_events
from .hpc_pool import plan_cancel, plan_hpc_pool
from .readiness import assess_job
from .start_problems import warn_once
from .status import StatusDraft, condition, finished, is_true


def plan(job: Job, observed: Observed, now: dt.datetime, options: PlanOptions) -> Plan:
    """Plan one pass over a job. Never raises, whatever users write or the cluster reports."""
    record = observed.record.copy()
    if job.deleted is not None:
        return _plan_deletion(PlanContext(job, observed, now, options, _fallback_spec(job, observed), record))
    verdict = examine(job, observed, options.allowed, options.defaults)
    if finished(job.status):
        spec = _fallback_spec(job, observed) if isinstance(verdict, Rejection) else verdict.spec
        return _plan_finished(PlanContext(job, observed, now, options, spec, record, requeue=options.idle))
    if isinstance(verdict, Rejection):
        return _rejected(job, now, options, verdict)
    context = PlanContext(job, observed, now, options, verdict.spec, record, requeue=options.idle)
    if verdict.spec.suspend:
        return _plan_suspended(context, verdict)
    return _plan_running(context, verdict)


def _plan_running(context: PlanContext, verdict: Acceptance) -> Plan:
    spec, status = context.spec, StatusDraft(context.job, context.now)
    started = status.started()
    if context.observed.conflicting:
        base = False
        context.requeue_after(context.options.resync)
    else:
        base = plan_base(context)
    aggregator = plan_aggregator(context, base)
    pools = [
        plan_cloud_pool(context, pool, base) if pool.cloud is not None else plan_hpc_pool(context, pool, base)
        for pool in spec.pools
    ]
    federation = aggregator.federation
    asked = context.observed.federation is not None
    alive = aggregator.status == "True"
    # While a running aggregator does not respond, its last report stays.
    ready = federation.connected if federation is not None and asked else ({} if not alive else None)
    _common_conditions(status, verdict)
    _warn_of_pools(context, pools)
    if context.volume_lost:
        status.forget_rounds()
    status.federation(spec, federation)
    status.secure(spec, federation)
    status.pools(pools, ready)
    message = _aggregator_condition(context, status, aggregator)
    if ready is not None:
        _quorum_condition(status, spec, sum(ready.get(name, 0) for name in _trainers(spec)))
    end = aggregator.result or _quorum_impossible(context, aggregator, pools) or _deadline(context, started)
    if end is not None:
        status.set(ConditionType(end.outcome), True, end.reason, end.message)
        if end.outcome == "Failed":
            status.set(ConditionType.AGGREGATOR_READY, False, Reason.AGGREGATOR_FINISHED, end.message)
        status.set(ConditionType.QUORUM_REACHED, False, Reason.WAITING_FOR_CLIENTS, "the job is over")
        status.completed()
        status.phase(end.outcome, end.message)
        # The result is written first; any operator derives the clean-up from it.
        context.actions.clear()
        context.requeue_after(0.1)
        return _finish(context, status)
    quorum = is_true(status.content, ConditionType.QUORUM_REACHED)
    training = alive and federation is not None and (quorum or federation.current_round > 0)
    if not message and not quorum:
        message = str((condition(status.content, ConditionType.QUORUM_REACHED) or {}).get("message", ""))
    if not message and federation is not None:
        message = one_line(federation.message)
    stays = alive and federation is None and context.job.status.get("phase") == "Running"
    status.phase("Running" if training or stays else "Starting", message)
    context.requeue_after(context.options.resync)
    return _finish(context, status)


def _common_conditions(status: StatusDraft, verdict: Acceptance) -> None:
    status.set(ConditionType.ACCEPTED, True, Reason.VALID, verdict.message)
    status.set(ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED)


def _warn_of_pools(context: PlanContext, pools: list[PoolOutcome]) -> None:
    before = {pool.get("name"): str(pool.get("reason") or "") for pool in context.job.status.get("pools") or ()}
    for pool in pools:
        if pool.warn:
            warn_once(context, Reason.CLIENTS_NOT_RUNNING, f"pool {pool.name}", before.get(pool.name, ""), pool.reason)


def _aggregator_condition(context: PlanContext, status: StatusDraft, aggregator: AggregatorOutcome) -> str:
    """Set AggregatorReady; return a message for users."""
    message = aggregator.message
    if context.observed.conflicting:
        taken = ", ".join(context.observed.conflicting)
        message = f"waits for object names that are taken: {taken}"
        if any(name.startswith("PersistentVolumeClaim/") for name in context.observed.conflicting):
            message += f" (to continue with this claim: kubectl annotate pvc {names.checkpoints(context.job.name)}"
            message += f" {names.ANNOTATION_ADOPT}={context.job.name} --namespace {context.job.namespace})"
    elif aggregator.status == "True" and context.observed.federation_error:
        message = f"it does not respond to the operator: {context.observed.federation_error}"
    if aggregator.warn or context.observed.conflicting:
        before = condition(context.job.status, ConditionType.AGGREGATOR_READY) or {}
        # The transition to AggregatorLost already causes an event.
        if aggregator.reason is not Reason.AGGREGATOR_LOST or before.get("reason") == Reason.AGGREGATOR_LOST:
            warn_once(context, aggregator.reason, "aggregator", str(before.get("message") or ""), message)
    status.set(ConditionType.AGGREGATOR_READY, aggregator.status == "True", aggregator.reason, message)
    return f"aggregator: {message}" if message else ""


def _quorum_condition(status: StatusDraft, spec: FederatedJobSpec, connected: int) -> None:
    message = f"{plural(connected, _counted(spec))} connected, {spec.min_clients} needed"
    enough = connected >= spec.min_clients
    # The message is constant while the condition holds, so that each connecting client does not change the status.
    if enough:
        message = f"at least {plural(spec.min_clients, _counted(spec))} connected"
    reason = Reason.ENOUGH_CLIENTS if enough else Reason.WAITING_FOR_CLIENTS
    status.set(ConditionType.QUORUM_REACHED, enough, reason, message)


def _trainers(spec: FederatedJobSpec) -> frozenset[str]:
    """Return the pools that train, whose clients count towards the quorum (as for the aggregator)."""
    return frozenset(pool.name for pool in spec.pools if pool.role == "Train")


def _counted(spec: FederatedJobSpec) -> str:
    return "client" if len(_trainers(spec)) == len(spec.pools) else "training client"


def _quorum_impossible(
    context: PlanContext, aggregator: AggregatorOutcome, outcomes: list[PoolOutcome]
) -> JobResult | None:
    """Return a failure if the job can never have enough clients."""
    needed = max(context.spec.min_clients, context.spec.min_updates)
    training = _trainers(context.spec)
    pools = [outcome for outcome in outcomes if outcome.name in training]
    possible = sum(pool.possible for pool in pools)
    if possible >= needed:
        return None
    if aggregator.status == "True" and context.observed.federation is None:
        # The training may be complete and its clients gone for that reason: query the aggregator first.
        context.requeue_after(context.options.resync)
        return None
    lost = [pool for pool in pools if pool.blocked is not None]
    causes = {pool.blocked for pool in lost}
    for reason in (Reason.POLICY_DENIED, Reason.QUEUE_TIMEOUT):
        if reason in causes:
            break
    else:
        reason = Reason.QUORUM_IMPOSSIBLE
    why = "; ".join(f"pool {pool.name}: {one_line(pool.reason)}" for pool in lost if pool.reason)
    message = f"{plural(possible, _counted(context.spec))} can still take part, {needed} are needed"
    return JobResult("Failed", reason, f"{message}; {why}" if why else message)


def _deadline(context: PlanContext, started: dt.datetime) -> JobResult | None:
    seconds = context.spec.active_deadline_seconds
    if seconds is None or not context.reached(started + dt.timedelta(seconds=seconds)):
        return None
    return JobResult("Failed", Reason.DEADLINE_EXCEEDED, f"not complete {seconds} s after its start")


def _plan_suspended(context: PlanContext, verdict: Acceptance) -> Plan:
    status = StatusDraft(context.job, context.now)
    if context.observed.accepted is None and not context.observed.conflicting:
        plan_base(context)
    # It is stopped rather than lost, and earlier crashes do not count after it is resumed.
    context.record.aggregator = AggregatorRecord()
    stopped = _stop_pods(context)
    settled = plan_cancel(context, "the job is suspended")
    status.set(ConditionType.ACCEPTED, True, Reason.VALID, verdict.message)
    status.set(ConditionType.SUSPENDED, True, Reason.SUSPENDED)
    status.set(ConditionType.AGGREGATOR_READY, False, Reason.SUSPENDED)
    status.set(ConditionType.QUORUM_REACHED, False, Reason.SUSPENDED)
    status.federation(context.spec, None)
    status.reset_start()
    status.idle_pools()
    status.phase("Suspended", "" if stopped and settled else _stopping(context, settled))
    return _finish(context, status)


def _plan_finished(context: PlanContext) -> Plan:
    """Clean up after the end. Pods that ended by themselves stay for their logs, the volume for the model."""
    status = StatusDraft(context.job, context.now)
    ended = parse_timestamp(context.job.status.get("completionTime")) or context.now
    complete = finished(context.job.status) is ConditionType.COMPLETE
    if not complete or context.elapsed(ended, dt.timedelta(seconds=context.options.grace)):
        _stop_pods(context)
        plan_cancel(context, "the job is complete" if complete else "the job failed")
    elif any(not record.ended for record in context.record.hpc.values()):
        _note_ended_pools(context)
    if not any(pod.active for pod in context.observed.pods):
        status.idle_pools()
    ttl = context.spec.ttl_seconds_after_finished
    if ttl is not None and context.reached(ended + dt.timedelta(seconds=ttl)):
        context.actions.append(DeleteJob())
    return _finish(context, status)


def _note_ended_pools(context: PlanContext) -> None:
    """Record which arrays ended by themselves during the grace period."""
    for name, record in context.record.hpc.items():
        view = context.observed.pools.get(name)
        if view is not None and view.attempt == record.attempt and view.ended:
            record.state = ArrayState.ENDED
    if any(not record.ended for record in context.record.hpc.values()):
        context.requeue_after(context.options.resync)


def _plan_deletion(context: PlanContext) -> Plan:
    job, status = context.job, StatusDraft(context.job, context.now)
    if FINALIZER not in job.finalizers:
        return Plan(status=job.status, requeue=context.options.idle)
    assert job.deleted is not None
    _stop_pods(context)
    others = tuple(name for name in job.finalizers if name != FINALIZER)
    if plan_cancel(context, "the job is deleted"):
        context.actions.append(SaveJob(finalizers=others))
        return Plan(tuple(context.actions), job.status)
    give_up = job.deleted + dt.timedelta(seconds=context.options.site_give_up)
    if context.reached(give_up):
        context.emit("Warning", Reason.SITE_UNREACHABLE, _give_up_message(context))
        context.actions = [
            RecordOrphan(key.pool, array.site, hpc_key(context.options.cluster, job, key.pool, array.attempt))
            for key, array in context.record.hpc.items()
            if not array.ended
        ]
        context.actions.append(SaveJob(finalizers=others))
        return Plan(tuple(context.actions), job.status, tuple(context.events))
    status.content["message"] = _stopping(context, False)
    return _finish(context, status)


def _give_up_message(context: PlanContext) -> str:
    """Return what may still run at sites and who cancels it: the operator, or people if the HPCSite is gone."""
    left = {key: array for key, array in context.record.hpc.items() if not array.ended}
    pools = ", ".join(f"{key} at {array.site}" for key, array in left.items())
    message = f"gave up cancelling after {context.options.site_give_up:g} s; it may still run: pool {pools}"
    gone = {key: array for key, array in left.items() if array.site not in context.observed.sites}
    if not gone:
        return f"{message}; it is cancelled once the site answers"
    cluster, job = context.options.cluster, context.job
    keys = ", ".join(f"isthmus-{hpc_key(cluster, job, key.pool, array.attempt)}" for key, array in gone.items())
    sites = ", ".join(sorted({array.site for array in gone.values()}))
    return f"{message}; HPCSite {sites} no longer exists: cancel the Slurm jobs named {keys} at the site by hand"


def _stop_pods(context: PlanContext) -> bool:
    """Delete every pod that has not ended. Return True if there is none."""
    running = [pod for pod in context.observed.pods if pod.active]
    context.actions += [DeletePod(pod.name, pod.uid) for pod in running]
    return not running


def _stopping(context: PlanContext, settled: bool) -> str:
    if settled:
        return "stopping its pods"
    waits = []
    for name, record in context.record.hpc.items():
        problem = context.observed.problems.get(name)
        if not record.ended:
            waits.append(f"{name} at {record.site}" + (f" ({one_line(problem.message, 100)})" if problem else ""))
    return f"cancelling pool {', '.join(waits)}"


def _rejected(job: Job, now: dt.datetime, options: PlanOptions, rejection: Rejection) -> Plan:
    status = StatusDraft(job, now)
    status.set(ConditionType.ACCEPTED, False, rejection.reason, rejection.message)
    status.phase("Rejected", rejection.message)
    assess_job(status)
    events = transition_events(job.status, status.content)
    # A new site wakes its jobs; the periodic pass covers a lost wake-up.
    requeue = min(options.idle, 60.0) if rejection.waits else options.idle
    return Plan(status=status.content, events=events, requeue=requeue)


def _finish(context: PlanContext, status: StatusDraft) -> Plan:
    """Assemble the plan. The record is saved before any other action."""
    job = context.job
    if job.deleted is None:
        assess_job(status)
    stored = context.observed.record
    record = context.record.bounded(job.uid, job.record_room)
    save = stored.damaged or context.record != stored
    finalizers, outside = None, _has_external_resources(context)
    if job.deleted is None and FINALIZER not in job.finalizers and outside and context.actions:
        finalizers = (*job.finalizers, FINALIZER)
    elif job.deleted is None and FINALIZER in job.finalizers and not outside:
        finalizers = tuple(name for name in job.finalizers if name != FINALIZER)  # set by an earlier operator
    unnoted = not job.names and not job.old_names and job.deleted is None and context.actions
    scheme = names.HASHED if unnoted and any(names.hashed(pool.name) for pool in context.spec.pools) else ""
    if save or finalizers is not None or scheme:
        context.actions.insert(0, SaveJob(record if save else None, finalizers, scheme))
    if context.suppressed_events:
        last = context.events[-1]
        context.events[-1] = Emit(
            last.type, last.reason, f"{last.message} (and {context.suppressed_events} more such events)"
        )
    events = (*transition_events(job.status, status.content), *context.events)
    return Plan(tuple(context.actions), status.content, events, context.requeue)


def _has_external_resources(context: PlanContext) -> bool:
    """Return True if the job has or may get resources outside the cluster.

    Owner references delete everything inside. A finalizer would only block the deletion of a namespace whose roles are
    gone first.
    """
    return bool(context.record.hpc) or any(pool.hpc is not None for pool in context.spec.pools)


def _fallback_spec(job: Job, observed: Observed) -> FederatedJobSpec:
    """Return a spec for a job that is being deleted or finished. Only its pools and time limits are read."""
    if observed.accepted is not None:
        return observed.accepted
    try:
        return parse_spec(job.spec)
    except ManifestError:
        return parse_spec({"rounds": 1, "task": {"image": "none", "command": ["none"]},
                           "pools": [{"name": "none", "cloud": {}}]})  # fmt: skip
