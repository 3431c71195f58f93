"""The reasons why a pod does not start, and when they are worth an event."""

import datetime as dt

from isthmus_contracts.api.federated_job_status import Reason

from ..render import kueue
from ..state.observed import PodView
from ..text import headline
from .context import PlanContext

# Kubernetes reports failing mounts in events only. Before this time, the pod may still be pulling its image.
_PATIENCE = dt.timedelta(seconds=60)


def why_not_started(context: PlanContext, pod: PodView) -> str:
    """Return what keeps a pod from starting; empty while it is merely starting."""
    if pod.waiting.startswith(kueue.GATED) and context.job.queue:
        return (
            f"{kueue.GATED}: waits for Kueue to admit it to the queue {context.job.queue}:"
            f" `kubectl get workloads --namespace {context.job.namespace}` shows which wait"
        )
    if pod.waiting:
        return pod.waiting
    if pod.phase != "Pending" or pod.placed is None or not context.reached(pod.placed + _PATIENCE):
        return ""
    mounts = f" ({', '.join(pod.mounts)})" if pod.mounts else ""
    return (
        "ContainerCreating: for more than a minute; its image is still being pulled, or a volume cannot be mounted"
        f"{mounts}: `kubectl describe pod {pod.name} --namespace {context.job.namespace}` shows which"
    )


def warn_once(context: PlanContext, reason: Reason, subject: str, before: str, now: str) -> None:
    """Emit a Warning for what keeps pods from starting, unless the status already reports the same."""
    if headline(now) != headline(before):
        context.emit("Warning", reason, f"{subject}: {now}")
