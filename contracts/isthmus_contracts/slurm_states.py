"""All job states that Slurm documents, and their meaning for a task of a pool.

The bridge reads them from Slurm, and the operator from the bridge's answers.
"""

from enum import Enum


class Meaning(Enum):
    """The meaning of a state for a task."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """True if the task has ended and holds no resources."""
        return self not in (Meaning.WAITING, Meaning.RUNNING)


# Source: squeue(1), "JOB STATE CODES", 22.05 to 25.11. Base states and flags: squeue prints a
# flag instead of the base state.
MEANINGS: dict[str, Meaning] = {
    "PENDING": Meaning.WAITING,
    "CONFIGURING": Meaning.WAITING,  # nodes are allocated and boot
    "POWER_UP_NODE": Meaning.WAITING,
    "REQUEUED": Meaning.WAITING,
    "REQUEUE_HOLD": Meaning.WAITING,
    "REQUEUE_FED": Meaning.WAITING,
    "RESV_DEL_HOLD": Meaning.WAITING,
    "SPECIAL_EXIT": Meaning.WAITING,  # requeued and held
    "EXPEDITING": Meaning.WAITING,  # requeued ahead of others
    "RUNNING": Meaning.RUNNING,
    "COMPLETING": Meaning.RUNNING,  # the final state follows
    "RESIZING": Meaning.RUNNING,
    "SIGNALING": Meaning.RUNNING,
    "STAGE_OUT": Meaning.RUNNING,
    "STOPPED": Meaning.RUNNING,  # keeps its processors
    "SUSPENDED": Meaning.RUNNING,  # without processors, resumes later
    "UPDATE_DB": Meaning.RUNNING,
    "COMPLETED": Meaning.SUCCEEDED,
    "BOOT_FAIL": Meaning.FAILED,
    "DEADLINE": Meaning.FAILED,
    "FAILED": Meaning.FAILED,
    "LAUNCH_FAILED": Meaning.FAILED,
    "NODE_FAIL": Meaning.FAILED,
    "OUT_OF_MEMORY": Meaning.FAILED,
    "PREEMPTED": Meaning.FAILED,  # a requeued one is PENDING again
    "RECONFIG_FAIL": Meaning.FAILED,
    "REVOKED": Meaning.FAILED,
    "TIMEOUT": Meaning.FAILED,
    "CANCELLED": Meaning.CANCELLED,
}

# Not a state of Slurm: neither the queue, accounting nor the task's own markers record how it ended.
LOST = "LOST"
MEANINGS[LOST] = Meaning.FAILED

# States of failed tasks that the site itself ended, by taking their nodes.
DISPLACED = frozenset({"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"})

# States of tasks that a pool's status leaves out. All other states are listed there.
UNLISTED = frozenset({"PENDING", "RUNNING", "COMPLETED"})


def normal(text: str) -> str:
    """Return the name of a state without additions, as in ``CANCELLED by 1000`` and ``RUNNING+``."""
    words = text.split()
    return words[0].rstrip("+") if words else ""


def meaning(state: str) -> Meaning:
    """Return the meaning of a state. Unknown states count as running, so that they end no pool."""
    return MEANINGS.get(state, Meaning.RUNNING)
