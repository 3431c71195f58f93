"""What the bridge asks of Slurm and what Slurm answers, whatever adapter carries it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Protocol

from .options import Options


class SlurmError(Exception):
    """Slurm could not be asked, or its answer is not understood. It says nothing about what exists."""


class Patience(Enum):
    """How long a refused submission is tried again."""

    NONE = 0
    """It is final: the same request would be refused again."""
    HOUR = 1
    """Accounts and users may reach the controller late."""
    QUEUE = 2
    """As long as the pool may wait in the queue: the site is full, drained or cannot be reached for now."""


class SubmissionRefused(SlurmError):
    """Slurm refused, or was never asked: nothing was submitted."""

    def __init__(self, message: str, patience: Patience = Patience.NONE) -> None:
        super().__init__(message)
        self.patience = patience


class SubmissionAmbiguous(SlurmError):
    """The job may have been submitted or not: it must be looked up by its name.

    ``waiting``: Slurm had no room, and the program that submits was ended between two tries of its own.
    """

    def __init__(self, message: str, *, waiting: bool = False) -> None:
        super().__init__(message)
        self.waiting = waiting


# The generic resource for which Slurm has options of its own.
GPU = "gpu"


@dataclass(frozen=True)
class Gres:
    """A generic resource of each task."""

    name: str
    type: str
    count: int

    def words(self, *, named: bool = True) -> str:
        """Return it in Slurm's notation, with its name or without: gpu:a100:2, a100:2."""
        return ":".join(filter(None, (self.name if named else "", self.type, str(self.count))))


@dataclass(frozen=True)
class Submission:
    """One job array, ready to submit. Every field has been checked against the site's policy."""

    name: str
    script: Path
    directory: Path
    """Private to the pool; the working directory of the batch script."""
    output: str
    """Pattern of the tasks' log files, in Slurm's notation (%a: the task's index)."""
    tasks: int
    comment: str
    partition: str
    """Empty: Slurm's default, or what a plug-in of the site chooses."""
    account: str
    qos: str
    time_limit_seconds: int
    warning_seconds: int
    """The batch script gets SIGTERM this long before the time limit."""
    cpus_per_task: int
    memory_mib: int
    """Of each task of the array, as is ``gres``."""
    steps: int = 1
    """Tasks within each task of the array, which its script starts; with more than one, these get the warning."""
    at_once: int = 0
    """How many tasks may run at the same time; 0: all."""
    gres: tuple[Gres, ...] = ()
    user: str = ""
    """The local user as whom it is submitted; empty: the one who runs the bridge."""
    guard: Path | None = None
    """A folder of the bridge's own, where it is written down that this is under way. None: ``directory``."""
    options: Options = field(default_factory=Options)
    """What the site's admin adds."""

    @property
    def memory(self) -> tuple[str, int]:
        """How memory is asked for (``per-node``, ``per-cpu``, ``per-gpu`` or ``none``), and how many MiB of it."""
        gpus = sum(gres.count for gres in self.gres if gres.name == GPU)
        match self.options.memory:
            case "none":
                return "none", 0
            case "per-cpu":
                return "per-cpu", -(-self.memory_mib // (self.steps * self.cpus_per_task))
            case "per-gpu" if gpus:
                return "per-gpu", -(-self.memory_mib // gpus)
            case _:
                return "per-node", self.memory_mib

    @property
    def gpus(self) -> tuple[str, tuple[Gres, ...]]:
        """How GPUs are asked for (``gres``, ``per-task``, ``per-node`` or ``per-job``), and which."""
        found = tuple(gres for gres in self.gres if gres.name == GPU)
        if self.options.gpus == "per-task":
            found = tuple(replace(gres, count=gres.count // self.steps) for gres in found)
        return self.options.gpus, found

    @property
    def plain_gres(self) -> tuple[Gres, ...]:
        """Generic resources that are asked for as such."""
        return tuple(gres for gres in self.gres if self.options.gpus == "gres" or gres.name != GPU)


@dataclass(frozen=True)
class TaskRecord:
    """What Slurm says about some tasks of an array: one that started, or all those that never did."""

    job_id: int
    """Slurm's id of this very task; the array's own where the tasks have not been told apart yet."""
    array_id: int
    name: str
    indices: tuple[int, ...] | None
    """None where Slurm does not say which tasks it means."""
    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    restarts: int = 0
    start: float = 0.0
    """Seconds since the epoch: of the start, or of the expected one; 0 where unknown."""
    submitted: float = 0.0
    node: str = ""
    ends: float = 0.0
    """Seconds since the epoch: when the time limit ends a task that runs; 0 where there is none, or it does not run."""
    user: str = ""
    """The local user who owns it; empty: the one who runs the bridge."""
    directory: str = ""
    """Its working directory, which shows whose array it is where the name was changed; empty where Slurm hides it."""


@dataclass(frozen=True)
class SiteDescription:
    """The cluster, as Slurm describes it."""

    version: str
    cluster: str
    accounting: str
    """Who answers about finished jobs: ``sacct``, ``sacct -c``, ``slurmdbd``, or nothing (empty)."""
    max_array_size: int
    """The highest index of an array is below this; 0: the adapter cannot tell."""
    private_jobs: bool = False
    """Ordinary users do not see each other's jobs."""


class SlurmAdapter(Protocol):
    """The way to Slurm. Every method raises :class:`SlurmError` where Slurm does not answer properly."""

    def submit(self, submission: Submission) -> int:
        """Submits, and returns the array's id. Raises :class:`SubmissionRefused`, :class:`SubmissionAmbiguous`."""
        ...

    def submission_may_run(self, directory: Path) -> bool:
        """Return whether a submission from this directory may still be under way, begun by this or a former process."""
        ...

    def jobs(self, users: Collection[str] = ()) -> Sequence[TaskRecord]:
        """Every job that the controller knows of the bridge's user and of ``users``, finished ones included.

        In one request. What others own is not in it, whatever its name.
        """
        ...

    def history(self, names: Sequence[str], since: float, user: str = "") -> Sequence[TaskRecord]:
        """Return what the accounts say about that user's arrays with these names, submitted at ``since`` or later.

        Empty where the site keeps no accounts that can be read; see :class:`SiteDescription`.
        """
        ...

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None, user: str = "") -> None:
        """Asks for the end of an array of that user, or of its tasks from ``first`` to ``last``.

        Touches nothing where the id meanwhile belongs to a job of another name or user.
        """
        ...

    def describe(self) -> SiteDescription:
        """Version and settings of the cluster."""
        ...

    def partitions(self) -> list[str]:
        """Names of the cluster's partitions."""
        ...
