"""The state of an array's tasks, derived from Slurm's records. Functions without side effects."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from isthmus_contracts.slurm_states import LOST, UNLISTED, Meaning, meaning

from ..files.run_directory import TaskMarker
from ..slurm.model import TaskRecord

# Slurm's backfill scheduler estimates starts again every half minute; smaller changes are not reported. Seconds.
_START_TOLERANCE = 60.0
_EARLIEST_WARNING = 60.0


@dataclass(frozen=True)
class TaskObservation:
    """The known state of one task."""

    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    node: str = ""
    job_id: int = 0
    restarts: int = 0
    tail: str = ""
    """The last lines of its log, if it has failed."""

    @property
    def meaning(self) -> Meaning:
        """The meaning of its state."""
        return meaning(self.state)


@dataclass(frozen=True)
class ClientNote:
    """The known end of a client that shares its job with others."""

    restarts: int
    """Slurm's restart count of the start that this note is about."""
    exit_code: int | None = None
    """``None`` if it has not ended, or could not record its end."""
    tail: str = ""


@dataclass(frozen=True)
class Observation:
    """The known state of an array. Tasks that are not listed wait in the queue."""

    tasks: Mapping[int, TaskObservation] = field(default_factory=dict)
    reason: str = ""
    """Why the waiting tasks wait, as Slurm states it."""
    expected_start: float = 0.0
    """Expected start of the next of them, in seconds since the epoch; 0 if unknown."""
    ends_at: float = 0.0
    """When the time limit ends the first of the running tasks, in seconds since the epoch; 0 if unknown."""
    limit_reached: bool = False
    """True if the array ended because of the time limit, or of the warning before it."""
    clients: Mapping[int, ClientNote] = field(default_factory=dict)
    """Notes by client, if several clients share a task; see :mod:`.clients`."""
    name: str = ""
    """The name of the array in Slurm, if it was changed; otherwise empty."""

    def counts(self, replicas: int) -> dict[Meaning, int]:
        """Return the number of tasks by the meaning of their state."""
        totals = dict.fromkeys(Meaning, 0)
        for task in self.tasks.values():
            totals[task.meaning] += 1
        totals[Meaning.WAITING] += replicas - len(self.tasks)
        return totals

    def over(self, replicas: int) -> bool:
        """Return whether every task has ended."""
        return len(self.tasks) >= replicas and all(task.meaning.over for task in self.tasks.values())

    def to_json(self) -> str:
        """Return the JSON that the journal stores."""
        tasks = {
            str(index): [t.state, t.reason, t.exit_code, t.signal, t.node, t.job_id, t.restarts, t.tail]
            for index, t in self.tasks.items()
        }
        content = {"tasks": tasks, "reason": self.reason, "start": self.expected_start, "ends": self.ends_at,
                   "limit": self.limit_reached}  # fmt: skip
        if self.clients:
            content["clients"] = {str(i): [n.restarts, n.exit_code, n.tail] for i, n in self.clients.items()}
        if self.name:
            content["name"] = self.name
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Observation":
        """Parse the JSON that the journal stores."""
        content = json.loads(text)
        tasks = {int(index): TaskObservation(*values) for index, values in content["tasks"].items()}
        clients = {int(index): ClientNote(*values) for index, values in content.get("clients", {}).items()}
        return cls(tasks, content["reason"], content["start"], content.get("ends", 0.0),
                   content.get("limit", False), clients, content.get("name", ""))  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The array that belongs to a pool, and the other live arrays of its name, which are to be cancelled."""

    array_id: int
    extras: tuple[int, ...] = ()


def choose(records: Iterable[TaskRecord], current: int) -> Choice | None:
    """Choose the current array if Slurm still knows it; else the live one with the lowest id; else the lowest id."""
    alive: dict[int, bool] = {}
    for record in records:
        lives = not meaning(record.state).over
        alive[record.array_id] = alive.get(record.array_id, False) or lives
    if not alive:
        return None
    living = sorted(array for array, lives in alive.items() if lives)
    chosen = current if current in alive else living[0] if living else min(alive)
    return Choice(chosen, tuple(array for array in living if array != chosen))


def observe(
    records: Sequence[TaskRecord], replicas: int, old: Observation, *, shrunk: bool = False
) -> tuple[Observation, list[int]]:
    """Return the observation that follows from the controller's records of one array, and the tasks without a record.

    ``shrunk``: tasks from ``replicas`` on were cancelled.
    """
    tasks: dict[int, TaskObservation] = {}
    waiting: set[int] = set()
    reasons: list[str] = []
    starts: list[float] = []
    ends = [record.ends for record in records if record.ends]
    rest: TaskRecord | None = None
    # If a task has two records, the live one counts; if both have ended, the later one.
    for record in sorted(records, key=lambda r: (not meaning(r.state).over, r.job_id)):
        if record.indices is None:
            # In a shrunk array it may be about the cancelled tasks: it says nothing about the others.
            rest = None if shrunk and meaning(record.state).over else record
            continue
        for index in record.indices:
            if not 0 <= index < replicas:
                continue
            tasks.pop(index, None)
            waiting.discard(index)
            if record.state == "PENDING":
                waiting.add(index)
            else:
                tasks[index] = _task(record, old.tasks.get(index))
        if meaning(record.state) is Meaning.WAITING:
            reasons.append(record.reason)
            starts.append(record.start)
    missing = []
    for index in range(replicas):
        if index in tasks or index in waiting:
            continue
        before = old.tasks.get(index)
        if before is not None and before.meaning.over:
            tasks[index] = before
        elif rest is not None:
            # A record without indices covers the waiting tasks that were cancelled together.
            if rest.state != "PENDING":
                tasks[index] = _task(rest, before)
        else:
            missing.append(index)
            if before is not None:
                tasks[index] = before
    expected = min((start for start in starts if start > 0), default=0.0)
    if old.expected_start and expected and abs(expected - old.expected_start) < _START_TOLERANCE:
        expected = old.expected_start
    reason = next(filter(None, reasons), "")
    ordered = dict(sorted(tasks.items()))
    return Observation(ordered, reason, expected, min(ends, default=0.0), clients=old.clients, name=old.name), missing


def resolve(
    observation: Observation,
    missing: Sequence[int],
    array_id: int,
    history: Sequence[TaskRecord],
    marks: Mapping[int, TaskMarker],
) -> tuple[Observation, list[int]]:
    """Find out how tasks ended that the controller has forgotten, from accounting, then from their own markers.

    Returns the new observation, and the indices of the tasks whose end is still unknown.
    """
    ended = [record for record in history if meaning(record.state).over]
    by_index = {index: record for record in ended if record.array_id == array_id for index in record.indices or ()}
    loose = {record.job_id: record for record in ended if record.indices is None and record.job_id >= array_id}
    known = {task.job_id for index, task in observation.tasks.items() if index not in missing}
    tasks = dict(observation.tasks)
    left: list[int] = []
    for index in missing:
        before = tasks.get(index)
        record = by_index.get(index) or (loose.get(before.job_id) if before else None)
        mark = marks.get(index)
        if record is not None:
            tasks[index] = _task(record, before)
            known.add(record.job_id)
        elif mark is not None and mark.array_id == array_id and mark.exit_code is not None:
            tasks[index] = _marked(mark, before)
            known.add(tasks[index].job_id)
        else:
            left.append(index)
    # Records of jobcomp/filetxt have no indices: records that match no other task belong to those that are left.
    # Tasks get their own job ids in the order of their indices; the last one keeps the id of the array.
    in_order = sorted(loose.values(), key=lambda record: (record.job_id == array_id, record.job_id))
    spare = [record for record in in_order if record.job_id not in known]
    still: list[int] = []
    for index in left:
        if not spare:
            still.append(index)
            continue
        # The last record stands for all remaining tasks: an array that was cancelled in the queue leaves one record.
        record = spare.pop(0) if len(spare) > 1 or _ran(spare[0]) else spare[0]
        tasks[index] = _task(record, tasks.get(index))
    return replace(observation, tasks=dict(sorted(tasks.items()))), still


def ended_by_limit(ended: Observation, before: Observation, now: float, warning: float) -> bool:
    """Return whether the time limit ended an array that is over and was observed as ``before``.

    ``now``: seconds since the epoch; ``warning``: seconds before the limit. Slurm may send the warning up to a minute
    early (sbatch(1), --signal), and tasks that react to it end with exit codes of their own.
    """
    if any(task.state == "TIMEOUT" for task in ended.tasks.values()):
        return True
    return 0 < before.ends_at <= now + warning + _EARLIEST_WARNING


def mark_lost(observation: Observation, missing: Sequence[int]) -> Observation:
    """Mark as LOST the tasks that left no record or marker."""
    tasks = dict(observation.tasks)
    for index in missing:
        before = tasks.get(index)
        last = before.state if before else "PENDING"
        tasks[index] = replace(before or TaskObservation(LOST), state=LOST, reason=f"last seen {last}")
    return replace(observation, tasks=dict(sorted(tasks.items())))


def notable(observation: Observation, most: int) -> list[tuple[int, TaskObservation]]:
    """Return at most ``most`` tasks to report: failed ones first, then those in an unusual state."""
    listed = [item for item in observation.tasks.items() if item[1].state not in UNLISTED]
    rank = {Meaning.FAILED: 0, Meaning.CANCELLED: 1}
    return sorted(listed, key=lambda item: (rank.get(item[1].meaning, 2), item[0]))[:most]


def _task(record: TaskRecord, before: TaskObservation | None) -> TaskObservation:
    same = before is not None and before.state == record.state and before.restarts == record.restarts
    return TaskObservation(
        state=record.state,
        reason=record.reason,
        exit_code=record.exit_code,
        signal=record.signal,
        node=record.node or (before.node if before else ""),
        job_id=record.job_id,
        restarts=record.restarts,
        tail=before.tail if same and before is not None else "",
    )


def _marked(mark: TaskMarker, before: TaskObservation | None) -> TaskObservation:
    base = before or TaskObservation("")
    return replace(
        base,
        state="FAILED" if mark.exit_code else "COMPLETED",
        reason="NonZeroExitCode" if mark.exit_code else "",
        exit_code=mark.exit_code or 0,
        signal=0,
        node=mark.node or base.node,
    )


def _ran(record: TaskRecord) -> bool:
    return bool(record.node)
