"""Every job state that Slurm documents, and what it means for a task of a pool."""

from enum import Enum


class Meaning(Enum):
    """What a state means for a task."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether the task has ended and holds no resources."""
        return self not in (Meaning.WAITING, Meaning.RUNNING)


# squeue(1), "JOB STATE CODES", 22.05 to 25.11, base states and flags alike: squeue prints a flag in the state's place.
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
    "COMPLETING": Meaning.RUNNING,  # how it ended shows when it has
    "RESIZING": Meaning.RUNNING,
    "SIGNALING": Meaning.RUNNING,
    "STAGE_OUT": Meaning.RUNNING,
    "STOPPED": Meaning.RUNNING,  # keeps its processors
    "SUSPENDED": Meaning.RUNNING,  # gave them up, goes on later
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

# Not a word of Slurm's: neither queue, accounts nor the task's own marks tell how it ended.
LOST = "LOST"
MEANINGS[LOST] = Meaning.FAILED

# States that need no mention of their own in a pool's status.
PLAIN = frozenset({"PENDING", "RUNNING", "COMPLETED"})


def normal(text: str) -> str:
    """Slurm's word for a state, without additions: ``CANCELLED by 1000`` and ``RUNNING+`` lose theirs."""
    words = text.split()
    return words[0].rstrip("+") if words else ""


def meaning(state: str) -> Meaning:
    """What the state means. One that this table does not know counts as running: nothing ends by a misunderstanding."""
    return MEANINGS.get(state, Meaning.RUNNING)
