"""Planning of the aggregator's pod: start, distinction of crashes and results, and replacement if it is lost."""

import datetime as dt
from dataclasses import dataclass
from typing import Literal

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason

from .. import names
from ..render import aggregator
from ..state.aggregator_status import from_termination
from ..state.observed import FederationView, PodView, PrivacyView, Refusal
from ..text import exited, killed, last_lines, one_line
from .actions import CreatePod, DeletePod
from .cloud_pool import restart_delay
from .context import JobResult, PlanContext
from .start_problems import why_not_started
from .status import rounded_up

# A pod that failed before its container could run (evicted, rejected by the node) is kept this long, so that a node
# that rejects every pod does not cause a tight loop.
_REPLACE_DELAY = dt.timedelta(seconds=5)
# A pod is gone seconds after its grace period, if its node responds.
_NODE_IS_LOST = dt.timedelta(minutes=2)
_NO_PROOF = (
    "it ended with exit code 0 and did not report that training is complete: check that the command, wrapper or image"
    " in spec.aggregator runs python -m isthmus.aggregator"
)


@dataclass(frozen=True)
class AggregatorOutcome:
    """The AggregatorReady condition, the aggregator's report, and the job's result if it has one."""

    status: Literal["True", "False"]
    reason: Reason
    message: str
    federation: FederationView | None = None
    result: JobResult | None = None
    warn: bool = False  # the message says what keeps it from starting, and is worth an event


def plan_aggregator(context: PlanContext, ready_to_start: bool) -> AggregatorOutcome:
    """Plan the aggregator of a job that is to run."""
    pod = aggregator_pod(context)
    if pod is None:
        if not ready_to_start:
            refused = [item for item in context.observed.refusals.items() if not item[0].startswith("Pod/")]
            words = "; ".join(_refused(key, refusal) for key, refusal in refused)
            message = words or "its Secrets, Service and volume are being created"
            return _not_ready(Reason.AGGREGATOR_STARTING, message, warn=bool(words))
        key = f"Pod/{names.aggregator(context.job.name)}"
        if not context.refused(key):
            seen = context.observed
            defaults, former = context.options.defaults, _former(context)
            made = aggregator.pod(context.job, context.spec, seen.authority, seen.code, defaults, former)
            context.actions.append(CreatePod(made))
        refusal = context.observed.refusals.get(key)
        message = f"the API server refused its pod: {refusal.message}" if refusal else "its pod is being created"
        reason = Reason.AGGREGATOR_LOST if context.record.aggregator.pod else Reason.AGGREGATOR_STARTING
        return _not_ready(reason, message, warn=refusal is not None)
    result, federation = job_result(context, pod)
    if result is not None:
        reason = Reason.AGGREGATOR_FINISHED if result.outcome == "Complete" else Reason.AGGREGATOR_FAILED
        return AggregatorOutcome("False", reason, result.message, federation, result)
    if pod.deleting and not context.record.aggregator.pod:
        return _not_ready(
            Reason.AGGREGATOR_STARTING, "the pod from before the suspension has not ended yet", federation
        )
    if pod.deleting:
        return _terminating(context, pod, federation)
    other_ca = _signed_by_other_ca(context, pod)
    if not other_ca and (result := _count_crashes(context, pod)):
        return AggregatorOutcome("False", Reason.AGGREGATOR_FAILED, result.message, federation, result)
    if pod.ended or other_ca:
        delay = restart_delay(context.record.aggregator.crashes) if _exited_without_proof(pod) else _REPLACE_DELAY
        if not pod.ended or context.elapsed(pod.ended_at(context.now), delay):
            context.actions.append(DeletePod(pod.name, pod.uid))
        return _not_ready(Reason.AGGREGATOR_LOST, f"its pod is replaced: {_why_replaced(pod)}", federation)
    if pod.ready:
        return AggregatorOutcome("True", Reason.AGGREGATOR_RUNNING, "", federation)
    if pod.restarts:
        return _not_ready(Reason.AGGREGATOR_LOST, f"it is restarted after a crash: {_last_words(pod)}", federation)
    waits = why_not_started(context, pod)
    return _not_ready(Reason.AGGREGATOR_STARTING, waits or "its pod is starting", federation, warn=bool(waits))


def _terminating(context: PlanContext, pod: PodView, federation: FederationView | None) -> AggregatorOutcome:
    """Return the outcome while the pod is being deleted. A lost node never confirms that it is gone."""
    node = pod.node or "?"
    if pod.overdue is None or not context.reached(pod.overdue + _NODE_IS_LOST):
        words = f"its pod is being deleted on node {node}; a new one follows"
        return _not_ready(Reason.AGGREGATOR_LOST, words, federation)
    words = (
        f"its pod is deleted, but node {node} does not confirm it, and no new one can start before; if that node"
        f" is down for good, an admin may declare it: kubectl taint node {node}"
        " node.kubernetes.io/out-of-service=nodeshutdown:NoExecute (or kubectl delete node), which also frees"
        " its volume"
    )
    return _not_ready(Reason.AGGREGATOR_LOST, words, federation, warn=True)


def _former(context: PlanContext) -> str:
    """Return the uid of the job whose claim this one adopted; empty where it adopted none."""
    claim = context.observed.live.get(f"PersistentVolumeClaim/{names.checkpoints(context.job.name)}") or {}
    annotations = (claim.get("metadata") or {}).get("annotations") or {}
    return str(annotations.get(names.ANNOTATION_ADOPTED) or "")


def aggregator_pod(context: PlanContext) -> PodView | None:
    """Return the aggregator's pod, if it exists."""
    name = names.aggregator(context.job.name)
    return next((pod for pod in context.observed.pods if pod.name == name), None)


def job_result(context: PlanContext, pod: PodView) -> tuple[JobResult | None, FederationView | None]:
    """Return the job's result, if the aggregator's status or termination message has one, and its report."""
    last = from_termination(pod.message if pod.ended else pod.last_message)
    for report in (context.observed.federation, last):
        if report is not None and report.phase == "COMPLETE":
            return _complete(report.completed_rounds, context.spec, report.privacy), report
        if report is not None and report.phase == "FAILED":
            return _failed(report.message), report
    federation = context.observed.federation or last
    # Exit code 0 alone proves nothing: a wrong command, wrapper or image also exits with it.
    if pod.phase == "Succeeded" and last is None and not pod.deleting and _all_rounds_reported(context):
        return _complete(context.spec.rounds, context.spec), federation
    return None, federation


def _all_rounds_reported(context: PlanContext) -> bool:
    """Return True if the aggregator had reported its last round and that round's model before it ended."""
    rounds, model = context.job.status.get("rounds") or {}, context.job.status.get("model") or {}
    last = context.spec.rounds
    return rounds.get("completed") == last and model.get("round") == last and bool(model.get("sha256"))


def _exited_without_proof(pod: PodView) -> bool:
    """Return True if the aggregator exited with code 0 by itself without proof that the job is complete."""
    return pod.phase == "Succeeded" and not pod.disrupted


def _why_replaced(pod: PodView) -> str:
    if not pod.ended:
        return "the job has a new CA"
    return _NO_PROOF if _exited_without_proof(pod) else one_line(pod.reason or pod.message or "it ended")


def _count_crashes(context: PlanContext, pod: PodView) -> JobResult | None:
    record = context.record.aggregator
    if record.pod != pod.uid:
        record.pod, record.restarts = pod.uid, 0
    ends = pod.restarts + _exited_without_proof(pod)
    if ends > record.restarts:
        # A round completed since the last crash resets the count.
        completed = int((context.job.status.get("rounds") or {}).get("completed", 0))
        if completed > record.round:
            record.round, record.crashes = completed, 0
        record.crashes += ends - record.restarts
        record.restarts = ends
    if record.crashes < context.options.aggregator_crashes:
        return None
    if _exited_without_proof(pod):
        return _failed(f"the aggregator ended {record.crashes} times without completing a round; {_NO_PROOF}")
    return _failed(f"the aggregator crashed {record.crashes} times without completing a round: {_last_words(pod)}")


def _refused(key: str, refusal: Refusal) -> str:
    # A refusal by the operator itself names the manifest's field.
    return refusal.message if refusal.by_operator else f"the API server refused {key}: {refusal.message}"


def _last_words(pod: PodView) -> str:
    words = (killed(pod.last_exit_code), last_lines(pod.last_message, 3))
    return ": ".join(filter(None, words)) or exited(pod.last_exit_code)


def _signed_by_other_ca(context: PlanContext, pod: PodView) -> bool:
    return bool(context.observed.authority) and pod.authority != context.observed.authority


def _complete(rounds: int, spec: FederatedJobSpec, privacy: PrivacyView | None = None) -> JobResult:
    goal, private = spec.objective, spec.privacy.differential_privacy
    if privacy is not None and private is not None and privacy.spent and rounds < spec.rounds:
        cost = f"epsilon is {rounded_up(privacy.epsilon)} after {rounds} of {spec.rounds} rounds"
        budget = f"another would pass maxEpsilon {private.max_epsilon}"
        return JobResult("Complete", Reason.PRIVACY_BUDGET_SPENT, f"{cost}, and {budget}")
    if goal.target is not None and rounds < spec.rounds:
        reached = f"{goal.metric} reached {goal.target} after {rounds} rounds"
        return JobResult("Complete", Reason.TARGET_REACHED, reached)
    return JobResult("Complete", Reason.ROUNDS_COMPLETED, f"{rounds} rounds completed")


def _failed(message: str) -> JobResult:
    return JobResult("Failed", Reason.AGGREGATOR_FAILED, message or "the aggregator gave up")


def _not_ready(
    reason: Reason, message: str, federation: FederationView | None = None, warn: bool = False
) -> AggregatorOutcome:
    return AggregatorOutcome("False", reason, message, federation, warn=warn)
