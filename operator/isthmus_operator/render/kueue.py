"""Kueue's groups of plain pods: the clients that a job needs for its quorum are admitted together, or not at all.

See https://kueue.sigs.k8s.io/docs/tasks/run/plain_pods. A group has a fixed number of pods, and Kueue deletes those
beyond it. So clients that the quorum does not need are admitted one by one. So is the aggregator: Kueue keeps a failed
member's pod until its replacement exists, and the aggregator's has the same name.
"""

from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec

from ..state.observed import Job

LABEL_GROUP = "kueue.x-k8s.io/pod-group-name"
ANNOTATION_COUNT = "kueue.x-k8s.io/pod-group-total-count"
GATED = "SchedulingGated"  # the scheduler's reason while a pod is not admitted


def group_name(job: Job) -> str:
    """Return the name of a job's group, and of Kueue's Workload: another one for a later job of this name."""
    return f"{job.name}-{job.uid[:8]}"


def members(spec: FederatedJobSpec) -> dict[str, int]:
    """Return by pool how many of its first clients belong to the group.

    These are the cloud clients without which no round can begin, even if every HPC client is there. The number follows
    from what does not change while a job lives.
    """
    hpc = sum(pool.size for pool in spec.pools if pool.hpc is not None and pool.role == "Train")
    needed = max(0, max(spec.min_clients, spec.min_updates) - hpc)
    found: dict[str, int] = {}
    for pool in spec.pools:
        if pool.cloud is not None and pool.role == "Train":
            found[pool.name] = min(pool.fewest, needed)
            needed -= found[pool.name]
    return found


def join(pod: dict[str, Any], job: Job, spec: FederatedJobSpec) -> None:
    """Make a client's pod a member of its job's group, if the job has a queue."""
    if not job.queue:
        return
    pod["metadata"]["labels"][LABEL_GROUP] = group_name(job)
    pod["metadata"]["annotations"][ANNOTATION_COUNT] = str(sum(members(spec).values()))
