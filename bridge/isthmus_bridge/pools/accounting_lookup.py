"""Look-ups of what Slurm's queue does not list: arrays of ambiguous submissions, and the ends of tasks.

They search accounting, and the markers that tasks leave in their pool's directory.
"""

import math
from collections.abc import Callable, Sequence

from isthmus_contracts.identities import slurm_job_name

from ..clients_per_job import per_job
from ..policy.policy import Policy
from ..slurm.model import SlurmAdapter, SlurmError, TaskRecord
from ..users.pool_directory import pool_directory
from .clients import markers_of_jobs
from .journal import Entry
from .observation import Observation, choose, resolve


class AccountingLookup:
    """Rate-limited look-ups: accounting is slower than the queue, and rarely changes."""

    def __init__(self, policy: Policy, adapter: SlurmAdapter, monotonic: Callable[[], float]) -> None:
        """``monotonic``: a monotonic clock, in seconds."""
        self._policy = policy
        self._adapter = adapter
        self._monotonic = monotonic
        self._spacing = policy.slurm.absence_seconds / policy.slurm.absence_lookups
        self._counted: dict[str, float] = {}
        self._asked: dict[str, float] = {}

    def is_due(self, key: str) -> bool:
        """Return whether one more look-up that found nothing counts; if so, start a new interval."""
        now = self._monotonic()
        if now < self._counted.get(key, -math.inf) + self._spacing:
            return False
        self._counted[key] = now
        return True

    def forget(self, key: str) -> None:
        """Drop what is kept about a pool that is over."""
        self._counted.pop(key, None)
        self._asked.pop(key, None)

    def find_array(self, entry: Entry) -> int | None:
        """Return the array of an ambiguous submission that the queue does not list.

        Returns ``None`` if the look-up succeeded and found nothing. Raises :class:`SlurmError` if it failed.
        """
        try:
            run = pool_directory(self._policy, entry.key, entry.user)
            if self._adapter.submission_may_run(run.guard):
                raise SlurmError("an earlier submission of the pool still runs")
            if marks := run.task_markers():
                return min(mark.array_id for mark in marks.values())
        except OSError as error:
            raise SlurmError(f"cannot read the pool's directory: {error.strerror}") from None
        choice = choose(self._history(entry), 0)
        return choice.array_id if choice else None

    def find_ends(
        self, entry: Entry, observation: Observation, missing: Sequence[int], *, first: bool
    ) -> tuple[Observation, list[int], SlurmError | None]:
        """Return the observation with those tasks' ends, the tasks still unknown, and accounting's error, if any.

        The tasks' own markers count even if accounting fails. Raises :class:`SlurmError` if they cannot be read.
        """
        try:
            marks = pool_directory(self._policy, entry.key, entry.user).task_markers()
        except OSError as error:
            raise SlurmError(f"cannot read the pool's directory: {error.strerror}") from None
        spec = entry.pool_spec()
        if per_job(spec) > 1:
            marks = markers_of_jobs(marks, spec)
        now = self._monotonic()
        history: Sequence[TaskRecord] = []
        failure = None
        if first or now >= self._asked.get(entry.key, -math.inf) + self._spacing:
            try:
                history = self._history(entry)
            except SlurmError as error:
                failure = error
            else:
                # Only after success: a failed query must not count as a look-up that found nothing.
                self._asked[entry.key] = now
        return *resolve(observation, missing, entry.array_id, history, marks), failure

    def _history(self, entry: Entry) -> Sequence[TaskRecord]:
        own = slurm_job_name(entry.key)
        names = [own, entry.observation.name] if entry.observation.name else [own]
        found = self._adapter.history(names, entry.created_at, entry.user)
        # Other jobs may have the name to which the array was changed.
        return [record for record in found if record.name == own or record.array_id == entry.array_id]
