"""The interface to Slurm that all adapters implement: submissions, task records, errors."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Protocol

from .options import Options


class SlurmError(Exception):
    """Slurm could not be queried, or its answer is malformed. It does not show which jobs exist."""


class Patience(Enum):
    """Retry time: how long a refused submission is retried."""

    NONE = 0
    """Not at all: the same request would be refused again."""
    HOUR = 1
    """An hour: new accounts and users may reach the controller late."""
    QUEUE = 2
    """As long as the pool may wait in the queue: the site is full, drained or unreachable for now."""


class SubmissionRefused(SlurmError):
    """Slurm refused the submission, or did not receive it: nothing was submitted."""

    def __init__(self, message: str, patience: Patience = Patience.NONE) -> None:
        super().__init__(message)
        self.patience = patience


class SubmissionAmbiguous(SlurmError):
    """It is unknown whether the job was submitted: it must be looked up by its name.

    ``waiting``: Slurm had no room, and sbatch was killed while it waited to retry.
    """

    def __init__(self, message: str, *, waiting: bool = False) -> None:
        super().__init__(message)
        self.waiting = waiting


# The generic resource that has options of its own in Slurm.
GPU = "gpu"


@dataclass(frozen=True)
class Gres:
    """A generic resource of each task."""

    name: str
    type: str
    count: int

    def words(self, *, named: bool = True) -> str:
        """Return the resource in Slurm's notation, with or without its name: gpu:a100:2, a100:2."""
        return ":".join(filter(None, (self.name if named else "", self.type, str(self.count))))


@dataclass(frozen=True)
class Submission:
    """One job array to submit. Every field has been checked against the site's policy."""

    name: str
    script: Path
    directory: Path
    """The pool's private directory, which is the working directory of the batch script."""
    output: str
    """Pattern of the tasks' log files, in Slurm's notation (%a: the task's index)."""
    tasks: int
    comment: str
    partition: str
    """Empty for Slurm's default, or the choice of a plug-in of the site."""
    account: str
    qos: str
    time_limit_seconds: int
    warning_seconds: int
    """Seconds before the time limit at which the batch script gets SIGTERM."""
    cpus_per_task: int
    memory_mib: int
    """Memory of each task of the array, in MiB. ``gres`` is per task too."""
    steps: int = 1
    """Slurm tasks within each array task, which its script starts; if more than one, these get the warning."""
    at_once: int = 0
    """Limit of tasks that run at the same time; 0 for no limit."""
    gres: tuple[Gres, ...] = ()
    user: str = ""
    """The local user who submits it; empty for the user who runs the bridge."""
    guard: Path | None = None
    """The bridge's folder in which the submission is recorded as under way; ``None`` for ``directory``."""
    options: Options = field(default_factory=Options)
    """Options that the site's admin adds."""

    @property
    def memory(self) -> tuple[str, int]:
        """The way to request memory (``per-node``, ``per-cpu``, ``per-gpu`` or ``none``), and the amount in MiB."""
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
        """The way to request GPUs (``gres``, ``per-task``, ``per-node`` or ``per-job``), and the GPUs."""
        found = tuple(gres for gres in self.gres if gres.name == GPU)
        if self.options.gpus == "per-task":
            found = tuple(replace(gres, count=gres.count // self.steps) for gres in found)
        return self.options.gpus, found

    @property
    def plain_gres(self) -> tuple[Gres, ...]:
        """Generic resources that are requested as such."""
        return tuple(gres for gres in self.gres if self.options.gpus == "gres" or gres.name != GPU)


@dataclass(frozen=True)
class TaskRecord:
    """Slurm's record of one started task of an array, or of all tasks that have not started."""

    job_id: int
    """Slurm's id of this task; the array's id if its tasks have no ids of their own yet."""
    array_id: int
    name: str
    indices: tuple[int, ...] | None
    """``None`` if Slurm does not say which tasks the record is about."""
    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    restarts: int = 0
    start: float = 0.0
    """The start or the expected start, in seconds since the epoch; 0 if unknown."""
    submitted: float = 0.0
    node: str = ""
    ends: float = 0.0
    """When the time limit ends a running task, in seconds since the epoch; 0 if it has none, or does not run."""
    user: str = ""
    """The local user who owns it; empty for the user who runs the bridge."""
    directory: str = ""
    """Its working directory, which identifies the array if its name was changed; empty if Slurm hides it."""


@dataclass(frozen=True)
class SiteDescription:
    """The cluster, as Slurm describes it."""

    version: str
    cluster: str
    accounting: str
    """The source of records of finished jobs: ``sacct``, ``sacct -c``, ``slurmdbd``, or empty for none."""
    max_array_size: int
    """The highest index of an array is below this; 0 if the adapter does not know it."""
    private_jobs: bool = False
    """True if ordinary users cannot see each other's jobs."""


class SlurmAdapter(Protocol):
    """Access to Slurm. Every method raises :class:`SlurmError` if Slurm does not answer properly."""

    def submit(self, submission: Submission) -> int:
        """Submit, and return the array's id. Raises :class:`SubmissionRefused`, :class:`SubmissionAmbiguous`."""
        ...

    def submission_may_run(self, directory: Path) -> bool:
        """Return whether a submission from this directory may be under way, by this or an earlier process."""
        ...

    def jobs(self, users: Collection[str] = ()) -> Sequence[TaskRecord]:
        """Return all jobs of the bridge's user and of ``users`` that the controller knows, finished ones included.

        Uses one request. Jobs of other users are not included, whatever their names.
        """
        ...

    def history(self, names: Sequence[str], since: float, user: str = "") -> Sequence[TaskRecord]:
        """Return the accounting records of that user's arrays with these names, submitted at ``since`` or later.

        ``since``: seconds since the epoch. Empty if the site has no accounting; see :class:`SiteDescription`.
        """
        ...

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None, user: str = "") -> None:
        """Cancel an array of that user, or its tasks from ``first`` to ``last``.

        Does nothing if the id now belongs to a job with another name or user.
        """
        ...

    def describe(self) -> SiteDescription:
        """Return version and settings of the cluster."""
        ...

    def partitions(self) -> list[str]:
        """Return the names of the cluster's partitions."""
        ...
