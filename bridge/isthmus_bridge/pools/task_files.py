"""Information that only the pools' files hold: the ends of clients that share a job, and the last lines of logs."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.slurm_states import Meaning

from ..clients_per_job import per_job
from ..policy.policy import Policy
from ..users.pool_directory import PoolDirectory, pool_directory
from .clients import by_client, with_exits, with_tails, without_exit
from .journal import Entry
from .observation import Observation

log = logging.getLogger(__name__)

_MAX_TAILS = 32
# Files of another local user are read this often, and when the pool's tasks change in the queue: each time costs a
# process. Seconds.
_LOOK_AGAIN = 10.0


class TaskFiles:
    """Reader of the pools' directories."""

    def __init__(self, policy: Policy, monotonic: Callable[[], float]) -> None:
        self._policy = policy
        self._monotonic = monotonic
        self._looked: dict[str, tuple[float, dict[int, str]]] = {}

    def forget(self, key: str) -> None:
        """Drop what is kept about a pool that is over."""
        self._looked.pop(key, None)

    def add_to(self, entry: Entry, spec: pb.PoolSpec, observation: Observation) -> Observation:
        """Return the observation, completed from the pool's files; if they are unreadable, log it and change
        nothing."""
        if entry.user and not self._due(entry.key, observation):
            return observation
        try:
            run = pool_directory(self._policy, entry.key, entry.user)
            return _with_tails(run, spec, _with_exits(run, entry, spec, observation))
        except OSError as error:
            log.warning("cannot read the pool's files: %s", error.strerror, extra={"key": entry.key})
            return observation

    def _due(self, key: str, observation: Observation) -> bool:
        now = self._monotonic()
        states = {index: task.state for index, task in observation.tasks.items()}
        last, known = self._looked.get(key, (-math.inf, {}))
        if states == known and now < last + _LOOK_AGAIN:
            return False
        self._looked[key] = now, states
        return True


def _with_exits(run: PoolDirectory, entry: Entry, spec: pb.PoolSpec, observation: Observation) -> Observation:
    """Add the ends of clients that share a job: Slurm reports them only when the whole job is over."""
    if per_job(spec) == 1 or not (wanted := without_exit(observation, spec)):
        return observation
    return with_exits(observation, entry.array_id, run.exits(wanted))


def _with_tails(run: PoolDirectory, spec: pb.PoolSpec, observation: Observation) -> Observation:
    """Add the last lines of its log to each failed task."""
    seen = by_client(observation, spec)
    lacking = [i for i, t in seen.tasks.items() if t.meaning is Meaning.FAILED and not t.tail][:_MAX_TAILS]
    if not lacking or sum(bool(task.tail) for task in seen.tasks.values()) >= _MAX_TAILS:
        return observation
    tails, share = run.tails(lacking), per_job(spec)
    if share == 1:
        tasks = {index: replace(task, tail=tails.get(index, task.tail)) for index, task in observation.tasks.items()}
        return replace(observation, tasks=tasks)
    silent = {index: index // share for index, tail in tails.items() if not tail}
    of_jobs = run.tails(sorted(set(silent.values())), of_jobs=True)
    return with_tails(observation, spec, tails | {index: of_jobs[job] for index, job in silent.items()})
