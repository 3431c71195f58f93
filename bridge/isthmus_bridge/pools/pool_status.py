"""The status of a pool as callers see it: its phase, its end in a sentence, and its protocol message."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.slurm_states import LOST, Meaning

from .clients import by_client
from .journal import Entry, State
from .observation import Observation, TaskObservation, notable

log = logging.getLogger(__name__)

MAX_TASKS = 32
# Not a real signal: slurmstepd reports this number if it cannot open the log or enter the working directory.
_COULD_NOT_BEGIN = 53
T = TypeVar("T")

_PHASES: Mapping[State, pb.Pool.Phase.ValueType] = {
    State.RESERVED: pb.Pool.SUBMITTING,
    State.SUBMITTING: pb.Pool.SUBMITTING,
    State.UNKNOWN: pb.Pool.UNKNOWN,
    State.SUCCEEDED: pb.Pool.SUCCEEDED,
    State.FAILED: pb.Pool.FAILED,
    State.CANCELLED: pb.Pool.CANCELLED,
}


def outcome(observation: Observation, replicas: int, *, cancelled: bool, why: str) -> tuple[State, str]:
    """Return the final state of a pool whose tasks have all ended, and a message."""
    counts = observation.counts(replicas)
    if cancelled:
        return State.CANCELLED, why
    if counts[Meaning.SUCCEEDED] == replicas:
        return State.SUCCEEDED, ""
    if counts[Meaning.CANCELLED] == replicas:
        return State.FAILED, "all tasks were cancelled, but not by the bridge"
    bad = [(index, task) for index, task in notable(observation, replicas) if task.meaning.over]
    index, task = bad[0]
    return State.FAILED, f"{len(bad)} of {replicas} tasks did not succeed; task {index}: {describe_end(task)}"


def describe_end(task: TaskObservation) -> str:
    """Describe the end of one task."""
    if task.state == LOST:
        return f"Slurm no longer knows it ({task.reason})"
    if task.signal == _COULD_NOT_BEGIN:
        why = "Slurm could not start it: its folder or its log cannot be opened on that node"
        return f"{task.state}, signal {task.signal}: {why}"
    if task.signal:
        return f"{task.state}, signal {task.signal}"
    return f"{task.state}, exit code {task.exit_code}" if task.exit_code else task.state


def phase(entry: Entry, counts: Mapping[Meaning, int]) -> pb.Pool.Phase.ValueType:
    """Return the phase of a pool in the protocol."""
    if entry.state is not State.SUBMITTED:
        return _PHASES[entry.state]
    if entry.stale:
        return pb.Pool.UNKNOWN
    return pb.Pool.RUNNING if counts[Meaning.RUNNING] else pb.Pool.PENDING


def to_pool(entry: Entry) -> pb.Pool:
    """Return the protocol's message for a pool."""
    spec = entry.pool_spec()
    seen = by_client(entry.observation, spec)
    counts = seen.counts(spec.replicas)
    live = not entry.state.over
    pool = pb.Pool(
        key=entry.key,
        version=entry.version,
        phase=phase(entry, counts),
        message=entry.stale or entry.message or _trouble(seen),
        slurm_job_id=str(entry.array_id) if entry.array_id else "",
        desired=spec.replicas,
        queued=counts[Meaning.WAITING] if live else 0,
        running=counts[Meaning.RUNNING] if live else 0,
        succeeded=counts[Meaning.SUCCEEDED],
        # Tasks cancelled on the caller's request are not failures; tasks cancelled by others are.
        failed=counts[Meaning.FAILED] + (0 if entry.cancel else counts[Meaning.CANCELLED]),
        reason=entry.observation.reason if live else "",
        expected_start=entry.observation.expected_start if live else 0.0,
        submitted_at=entry.submitted_at,
        job_uid=spec.job_uid,
        time_limit_reached=entry.observation.limit_reached and not entry.cancel,
        ends_at=entry.observation.ends_at if live else 0.0,
    )
    for index, task in notable(seen, MAX_TASKS):
        if entry.cancel and task.meaning is Meaning.CANCELLED:
            continue
        pool.tasks.append(
            pb.Task(
                index=index, state=task.state, reason=task.reason, exit_code=_number(task.exit_code),
                signal=task.signal, node=task.node, log_tail=task.tail,
            )
        )  # fmt: skip
    return pool


def convert_or_log(convert: Callable[[Entry], T], entry: Entry) -> T | None:
    """Convert one pool; log an error and return ``None`` on failure, so that one bad entry does not hide the others."""
    try:
        return convert(entry)
    except Exception:
        log.exception("cannot report the pool", extra={"key": entry.key})
        return None


def _number(value: int) -> int:
    """Return an exit code that fits the message's field; -1 if it does not, as in a forged marker."""
    return value if 0 <= value <= 0x7FFFFFFF else -1


def _trouble(observation: Observation) -> str:
    """Describe the first failed task; empty if none has failed."""
    for index, task in notable(observation, 1):
        if task.meaning is Meaning.FAILED:
            return f"task {index}: {describe_end(task)}"
    return ""
