"""The aggregator's pod: start it, tell its crashes from its verdicts, replace it when it is lost."""

import datetime as dt
from dataclasses import dataclass
from typing import Literal

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason

from .. import names
from ..render import aggregator
from ..state.aggregator_status import from_termination
from ..state.observed import FederationView, PodView, PrivacyView
from ..text import exited, killed, last_lines, one_line
from .actions import CreatePod, DeletePod
from .cloud_pool import restart_delay
from .context import Draft, Verdict
from .start_problems import why_not_started
from .status import rounded_up

# A pod that failed before its container could run (evicted, refused by the node) is kept this long, so that a node
# that refuses every pod is not asked in a tight loop.
_REPLACE_DELAY = dt.timedelta(seconds=5)
# After the end of its grace period a pod takes seconds to go, where its node answers.
_NODE_IS_LOST = dt.timedelta(minutes=2)
_NO_PROOF = (
    "it ended with exit code 0 and did not report that training is complete: check that the command, wrapper or image"
    " in spec.aggregator runs python -m isthmus.aggregator"
)


@dataclass(frozen=True)
class AggregatorOutcome:
    """The AggregatorReady condition, what the aggregator says, and whether that ends the job."""

    status: Literal["True", "False"]
    reason: Reason
    message: str
    federation: FederationView | None = None
    verdict: Verdict | None = None
    held: bool = False  # the message says what keeps it from starting: worth an event


def plan_aggregator(draft: Draft, ready_to_start: bool) -> AggregatorOutcome:
    """Plans the aggregator of a job that shall run."""
    pod = aggregator_pod(draft)
    if pod is None:
        if not ready_to_start:
            refused = [item for item in draft.observed.refusals.items() if not item[0].startswith("Pod/")]
            words = "; ".join(_refused(key, refusal.message) for key, refusal in refused)
            message = words or "its Secrets, Service and volume are being made"
            return _down(Reason.AGGREGATOR_STARTING, message, held=bool(words))
        key = f"Pod/{names.aggregator(draft.job.name)}"
        if not draft.refused(key):
            seen = draft.observed
            made = aggregator.pod(draft.job, draft.spec, seen.authority, seen.code, draft.limits.defaults)
            draft.actions.append(CreatePod(made))
        refusal = draft.observed.refusals.get(key)
        message = f"the API server refused its pod: {refusal.message}" if refusal else "its pod is being made"
        reason = Reason.AGGREGATOR_LOST if draft.record.aggregator.pod else Reason.AGGREGATOR_STARTING
        return _down(reason, message, held=refusal is not None)
    verdict, federation = judge(draft, pod)
    if verdict is not None:
        reason = Reason.AGGREGATOR_FINISHED if verdict.outcome == "Complete" else Reason.AGGREGATOR_FAILED
        return AggregatorOutcome("False", reason, verdict.message, federation, verdict)
    if pod.deleting and not draft.record.aggregator.pod:
        return _down(Reason.AGGREGATOR_STARTING, "the pod from before the suspension is still ending", federation)
    if pod.deleting:
        return _leaving(draft, pod, federation)
    foreign = _foreign_authority(draft, pod)
    if not foreign and (verdict := _count_crashes(draft, pod)):
        return AggregatorOutcome("False", Reason.AGGREGATOR_FAILED, verdict.message, federation, verdict)
    if pod.ended or foreign:
        delay = restart_delay(draft.record.aggregator.crashes) if _unproven(pod) else _REPLACE_DELAY
        if not pod.ended or draft.rested(pod.ended_at(draft.now), delay):
            draft.actions.append(DeletePod(pod.name, pod.uid))
        return _down(Reason.AGGREGATOR_LOST, f"its pod is replaced: {_why_replaced(pod)}", federation)
    if pod.ready:
        return AggregatorOutcome("True", Reason.AGGREGATOR_RUNNING, "", federation)
    if pod.restarts:
        return _down(Reason.AGGREGATOR_LOST, f"it is restarted after a crash: {_last_words(pod)}", federation)
    waits = why_not_started(draft, pod)
    return _down(Reason.AGGREGATOR_STARTING, waits or "its pod is starting", federation, held=bool(waits))


def _leaving(draft: Draft, pod: PodView, federation: FederationView | None) -> AggregatorOutcome:
    """Tell whether the pod's node still has to confirm that it is gone. One that is lost never does."""
    node = pod.node or "?"
    if pod.overdue is None or not draft.reached(pod.overdue + _NODE_IS_LOST):
        words = f"its pod is being deleted on node {node}; a new one follows"
        return _down(Reason.AGGREGATOR_LOST, words, federation)
    words = (
        f"its pod is deleted, but node {node} does not confirm it, and no new one can start before; if that node"
        f" is down for good, an admin may say so: kubectl taint node {node}"
        " node.kubernetes.io/out-of-service=nodeshutdown:NoExecute (or kubectl delete node), which frees"
        " its volume, too"
    )
    return _down(Reason.AGGREGATOR_LOST, words, federation, held=True)


def aggregator_pod(draft: Draft) -> PodView | None:
    """The aggregator's pod, if there is one."""
    name = names.aggregator(draft.job.name)
    return next((pod for pod in draft.observed.pods if pod.name == name), None)


def judge(draft: Draft, pod: PodView) -> tuple[Verdict | None, FederationView | None]:
    """Whether the aggregator has ended the job, by its own status or by its last words; and what it says."""
    last = from_termination(pod.message if pod.ended else pod.last_message)
    for said in (draft.observed.federation, last):
        if said is not None and said.phase == "COMPLETE":
            return _complete(said.completed_rounds, draft.spec, said.privacy), said
        if said is not None and said.phase == "FAILED":
            return _failed(said.message), said
    federation = draft.observed.federation or last
    # Exit code 0 alone proves nothing: a wrong command, wrapper or image ends with it, too.
    if pod.phase == "Succeeded" and last is None and not pod.deleting and _all_rounds_reported(draft):
        return _complete(draft.spec.rounds, draft.spec), federation
    return None, federation


def _all_rounds_reported(draft: Draft) -> bool:
    """Return whether the aggregator had reported its last round and that round's model before it ended."""
    rounds, model = draft.job.status.get("rounds") or {}, draft.job.status.get("model") or {}
    last = draft.spec.rounds
    return rounds.get("completed") == last and model.get("round") == last and bool(model.get("sha256"))


def _unproven(pod: PodView) -> bool:
    """Return whether the aggregator ended with exit code 0 by itself. With a proof, the job would be complete."""
    return pod.phase == "Succeeded" and not pod.disrupted


def _why_replaced(pod: PodView) -> str:
    if not pod.ended:
        return "its certificates were made anew"
    return _NO_PROOF if _unproven(pod) else one_line(pod.reason or pod.message or "it ended")


def _count_crashes(draft: Draft, pod: PodView) -> Verdict | None:
    record = draft.record.aggregator
    if record.pod != pod.uid:
        record.pod, record.restarts = pod.uid, 0
    ends = pod.restarts + _unproven(pod)
    if ends > record.restarts:
        # A round that was completed since the last crash makes good for the crashes before.
        completed = int((draft.job.status.get("rounds") or {}).get("completed", 0))
        if completed > record.round:
            record.round, record.crashes = completed, 0
        record.crashes += ends - record.restarts
        record.restarts = ends
    if record.crashes < draft.limits.aggregator_crashes:
        return None
    if _unproven(pod):
        return _failed(f"the aggregator ended {record.crashes} times without completing a round; {_NO_PROOF}")
    return _failed(f"the aggregator crashed {record.crashes} times without completing a round: {_last_words(pod)}")


def _refused(key: str, message: str) -> str:
    # What the operator itself refuses names the manifest's field.
    return message if message.startswith("spec.") else f"the API server refused {key}: {message}"


def _last_words(pod: PodView) -> str:
    words = (killed(pod.last_exit_code), last_lines(pod.last_message, 3))
    return ": ".join(filter(None, words)) or exited(pod.last_exit_code)


def _foreign_authority(draft: Draft, pod: PodView) -> bool:
    return bool(draft.observed.authority) and pod.authority != draft.observed.authority


def _complete(rounds: int, spec: FederatedJobSpec, privacy: PrivacyView | None = None) -> Verdict:
    goal, private = spec.objective, spec.privacy.differential_privacy
    if privacy is not None and private is not None and privacy.spent and rounds < spec.rounds:
        cost = f"epsilon is {rounded_up(privacy.epsilon)} after {rounds} of {spec.rounds} rounds"
        budget = f"another would pass maxEpsilon {private.max_epsilon}"
        return Verdict("Complete", Reason.PRIVACY_BUDGET_SPENT, f"{cost}, and {budget}")
    if goal.target is not None and rounds < spec.rounds:
        reached = f"{goal.metric} reached {goal.target} after {rounds} rounds"
        return Verdict("Complete", Reason.TARGET_REACHED, reached)
    return Verdict("Complete", Reason.ROUNDS_COMPLETED, f"{rounds} rounds completed")


def _failed(message: str) -> Verdict:
    return Verdict("Failed", Reason.AGGREGATOR_FAILED, message or "the aggregator gave up")


def _down(
    reason: Reason, message: str, federation: FederationView | None = None, held: bool = False
) -> AggregatorOutcome:
    return AggregatorOutcome("False", reason, message, federation, held=held)
