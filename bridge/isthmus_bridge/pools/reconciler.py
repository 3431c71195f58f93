"""The reconciler: polls Slurm's queue once for all pools, then advances each pool."""

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.process import backoff
from isthmus_contracts.slurm_states import Meaning, meaning

from ..clients_per_job import jobs_for
from ..metrics import Metrics
from ..policy.policy import Policy
from ..slurm.environment import user_name
from ..slurm.model import SlurmAdapter, SlurmError, TaskRecord
from ..slurm.unix_users import uid_of
from ..users.user_checks import local_users
from . import job_owners
from .accounting_lookup import AccountingLookup
from .audit_events import Auditor
from .clients import by_client
from .departures import DepartureCollector
from .job_owners import Owner
from .journal import Entry, Journal, State
from .observation import Observation, choose, ended_by_limit, mark_lost, observe
from .pool_status import outcome
from .status_file import StatusFile
from .submitter import Submitter, forget_credentials, warning_seconds
from .task_files import TaskFiles

log = logging.getLogger(__name__)

# Number of consecutive failed polls of the queue before pools are reported as UNKNOWN.
_FAILURES_BEFORE_STALE = 3
_LONGEST_PAUSE = 30.0
_CANCEL_AGAIN = 10.0
# Arrays of finished pools may appear late: from an sbatch that was given up but still ran, or a manual requeue.
_SWEEP_EVERY = 30.0
_SWEEP_FOR = 900.0
MAX_SUBMISSIONS = 5


class Reconciler:
    """The reconciliation loop. One pass is :meth:`tick`, which only one thread may call."""

    def __init__(
        self,
        policy: Policy,
        journal: Journal,
        adapter: SlurmAdapter,
        submitter: Submitter,
        metrics: Metrics,
        auditor: Auditor,
        advance: Callable[[str], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``monotonic``: a clock for durations, which setting the system clock does not change."""
        self._policy = policy
        self._journal = journal
        self._adapter = adapter
        self._submitter = submitter
        self._metrics = metrics
        self._advance = advance
        self._clock = clock
        self._monotonic = monotonic
        self._lookup = AccountingLookup(policy, adapter, monotonic)
        self._task_files = TaskFiles(policy, monotonic)
        self._auditor = auditor
        self._departures = DepartureCollector(policy, auditor, monotonic)
        self._users = set(local_users(policy))
        self._failures = 0
        self._asked_to_cancel: dict[tuple[str, int, int], float] = {}
        self._last_sweep = -math.inf
        self._sweep_until = monotonic() + _SWEEP_FOR
        self._seen = journal.version
        self._reported_foreign: set[Owner] = set()
        self._outside: set[str] = set()
        self._pools: Mapping[Owner, Sequence[TaskRecord]] = {}
        self._status = StatusFile(policy.status_path)
        self.wake = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Run passes until ``stop`` is set."""
        while not stop.is_set():
            self.wake.clear()
            pause = _LONGEST_PAUSE
            try:
                pause = self.tick()
                self._status.update(self._journal.live(), self._clock())
            except Exception:
                log.exception("a reconciliation pass failed")
            # New and cancelled pools wake the loop, but Slurm is never polled more often than every `poll_seconds`.
            stop.wait(min(pause, self._policy.slurm.poll_seconds))
            self.wake.wait(max(0.0, pause - self._policy.slurm.poll_seconds))

    def tick(self) -> float:
        """Run one pass. Return the seconds to wait before the next one."""
        live = self._journal.live()
        for entry in live:
            if entry.state is State.RESERVED:
                self._advance(entry.key)
            elif entry.state is State.SUBMITTING:
                self._mark_unknown(entry.key)
        live = self._journal.live()
        self._count(live)
        followed = [entry for entry in live if entry.state in (State.SUBMITTED, State.UNKNOWN)]
        now = self._monotonic()
        version = self._journal.version
        if followed or version != self._seen:
            # A new version without a live pool: a pool that was cancelled before it was requested. A lost journal may
            # have contained it, so the sweep has to look for its array.
            self._seen = version
            self._sweep_until = now + _SWEEP_FOR
        elif now > self._sweep_until or now < self._last_sweep + _SWEEP_EVERY:
            return self._policy.slurm.poll_seconds if live else _LONGEST_PAUSE
        self._last_sweep = now
        try:
            # Users without live pools are polled as long as this process runs: their arrays may appear late.
            self._users |= {entry.user for entry in followed if entry.user}
            gone = {user for user in self._users if uid_of(user) is None}
            records = self._adapter.jobs(self._users - gone)
        except SlurmError as error:
            return self._unreachable(followed, error)
        self._reachable()
        self._pools, rest = job_owners.group_by_pool(records, self._policy)
        for entry in followed:
            try:
                if entry.user in gone:
                    self._change(entry, stale=f"the local user {entry.user} is not known on the bridge's machine")
                else:
                    self._follow(entry, self._pools.get((entry.key, entry.user), []))
            except Exception:
                # A failure of one pool must not affect the others.
                log.exception("cannot reconcile the pool", extra={"key": entry.key})
        self._sweep(rest)
        return self._policy.slurm.poll_seconds if followed else _SWEEP_EVERY

    def _mark_unknown(self, key: str) -> None:
        """Mark a submission as UNKNOWN if no thread runs it: the bridge died, or could not record the answer."""
        with self._journal.transaction():
            entry = self._journal.get(key)
            if entry is not None and entry.state is State.SUBMITTING and not self._submitter.busy(key):
                self._journal.update(
                    key, state=State.UNKNOWN, unknown_since=self._clock(), missed_lookups=0,
                    message="looking for the array in Slurm: the bridge stopped during the submission",
                )  # fmt: skip
                log.warning("submission is ambiguous after a restart", extra={"key": key})

    def _follow(self, entry: Entry, records: Sequence[TaskRecord]) -> None:
        if entry.state is State.UNKNOWN:
            self._find_array(entry, records)
        else:
            self._observe(entry, records)

    def _find_array(self, entry: Entry, records: Sequence[TaskRecord]) -> None:
        """Look for the array of an ambiguous submission, and adopt it."""
        choice = choose(records, 0)
        if choice is None:
            try:
                found = self._lookup.find_array(entry)
            except SlurmError as error:
                self._metrics.lookup_failures.inc()
                self._change(entry, stale=f"looking for the array in Slurm: {error}")
                return
            if found is None:
                self._count_missed_lookup(entry)
                return
            array_id, submitted = found, 0.0
        else:
            array_id = choice.array_id
            submitted = max((r.submitted for r in records if r.array_id == array_id), default=0.0)
        self._metrics.adoptions.inc()
        log.info("found in Slurm as job %d", array_id, extra={"key": entry.key, "slurm_job": array_id})
        adopted = self._change(
            entry, state=State.SUBMITTED, array_id=array_id, submitted_at=submitted or self._clock(), unknown_since=0.0,
            missed_lookups=0, stale="", message=entry.message if entry.cancel else "",
        )  # fmt: skip
        if adopted is not None:
            self._observe(adopted, records)

    def _count_missed_lookup(self, entry: Entry) -> None:
        """Count one successful look-up that found nothing; submit again, or give up, after enough of them."""
        if not self._lookup.is_due(entry.key):
            if entry.stale:
                self._change(entry, stale="")
            return
        missed_lookups = entry.missed_lookups + 1
        slurm, now = self._policy.slurm, self._clock()
        since = min(entry.unknown_since, now)  # if later than now, the clock was set back
        if missed_lookups < slurm.absence_lookups or now < since + slurm.absence_seconds:
            self._change(entry, missed_lookups=missed_lookups, unknown_since=since, stale="")
        elif entry.cancel:
            self._finish(entry, State.CANCELLED, entry.message, entry.observation)
        elif entry.submissions >= MAX_SUBMISSIONS:
            message = f"sbatch failed {entry.submissions} times and left no array; the last time: {entry.message}"
            self._finish(entry, State.FAILED, message, entry.observation)
        else:
            log.warning("not in Slurm after %d look-ups: submitting", missed_lookups, extra={"key": entry.key})
            if self._change(entry, state=State.RESERVED, missed_lookups=0, unknown_since=0.0, stale="") is not None:
                self._advance(entry.key)

    def _observe(self, entry: Entry, records: Sequence[TaskRecord]) -> None:
        """Record the progress of the tasks of the pool's array, and finish the pool when they have ended."""
        choice = choose(records, entry.array_id)
        for other in {record.array_id for record in records if not meaning(record.state).over} - {entry.array_id}:
            self._cancel(entry, other, extra=True)
        mine = [record for record in records if record.array_id == entry.array_id] if choice else []
        spec = entry.pool_spec()
        jobs = jobs_for(spec)
        shrunk = bool(entry.kept_replicas) and not entry.cancel
        observation, missing = observe(mine, jobs, entry.observation, shrunk=shrunk)
        self._note_starts(entry, mine)
        if (name := job_owners.changed_name(mine, entry.key)) and name != entry.observation.name:
            log.warning(
                "the pool's array was renamed to %r; identifying it by its working directory", name,
                extra={"key": entry.key, "slurm_job": entry.array_id},
            )  # fmt: skip
            observation = replace(observation, name=name)
        changes: dict[str, object] = {"stale": ""}
        if missing:
            observation, changes = self._look_up_missing(entry, observation, missing)
        elif entry.unknown_since:
            changes |= {"unknown_since": 0.0, "missed_lookups": 0}
        observation = self._task_files.add_to(entry, spec, observation)
        self._departures.collect(entry)
        surplus = self._surplus(entry, mine, jobs) if entry.kept_replicas else False
        if observation.over(jobs) and not surplus:
            warning = warning_seconds(self._policy, spec)
            if ended_by_limit(observation, entry.observation, self._clock(), warning):
                observation = replace(observation, limit_reached=True)
            seen = by_client(observation, spec)
            state, message = outcome(seen, spec.replicas, cancelled=entry.cancel, why=entry.message)
            self._finish(entry, state, message, observation)
            return
        if entry.cancel:
            self._cancel(entry, entry.array_id)
        if observation != entry.observation:
            changes["observation"] = observation
        self._change(entry, **changes)

    def _look_up_missing(
        self, entry: Entry, observation: Observation, missing: Sequence[int]
    ) -> tuple[Observation, dict[str, object]]:
        """Look up tasks that the controller no longer knows; return the new observation and the fields to change."""
        now = self._clock()
        since = min(entry.unknown_since or now, now)
        changes: dict[str, object] = {"stale": "", "unknown_since": since}
        try:
            observation, still, failure = self._lookup.find_ends(
                entry, observation, missing, first=not entry.unknown_since
            )
        except SlurmError as error:
            still, failure = list(missing), error
        if not still:
            return observation, {"stale": "", "unknown_since": 0.0, "missed_lookups": 0}
        if failure is not None:
            self._metrics.lookup_failures.inc()
            log.warning("cannot look up tasks that left the queue: %s", failure, extra={"key": entry.key})
            return observation, changes
        if not self._lookup.is_due(entry.key):
            return observation, changes
        changes["missed_lookups"] = missed_lookups = entry.missed_lookups + 1
        slurm = self._policy.slurm
        if missed_lookups >= slurm.absence_lookups and now >= since + slurm.absence_seconds:
            log.error("Slurm has lost %d tasks", len(still), extra={"key": entry.key, "slurm_job": entry.array_id})
            observation = mark_lost(observation, still)
        return observation, changes

    def _surplus(self, entry: Entry, records: Sequence[TaskRecord], jobs: int) -> bool:
        """Cancel the surplus tasks of a shrunk pool. Return whether any may be left."""
        if not records:
            # squeue does not list the array: it has ended and only accounting knows it, or it is too new to be
            # listed, and then all of its tasks are live.
            asked = jobs_for(pb.PoolSpec.FromString(entry.spec))
            return asked > jobs and not self._cancel(entry, entry.array_id, jobs, asked - 1)
        living = [record.indices or () for record in records if not meaning(record.state).over]
        last = max((max(indices) for indices in living if indices), default=-1)
        if last < jobs:
            return False
        self._cancel(entry, entry.array_id, jobs, last)
        return True

    def _note_starts(self, entry: Entry, records: Sequence[TaskRecord]) -> None:
        for record in records:
            if meaning(record.state) is Meaning.WAITING or not record.start or not record.submitted:
                continue
            if any(index not in entry.observation.tasks for index in record.indices or ()):
                self._metrics.queue_wait.observe(max(0.0, record.start - record.submitted))

    def _cancel(
        self, entry: Entry, array_id: int, first: int = 0, last: int | None = None, *, extra: bool = False
    ) -> bool:
        """Cancel an array or a range of its tasks, unless done a moment ago; return whether Slurm accepted it."""
        key = entry.key
        now, asked = self._monotonic(), (key, array_id, first)
        if now < self._asked_to_cancel.get(asked, -math.inf) + _CANCEL_AGAIN:
            return True
        self._asked_to_cancel[asked] = now
        if extra:
            self._metrics.extras.inc()
            log.warning("cancelling an extra array", extra={"key": key, "slurm_job": array_id})
        records = [r for r in self._pools.get((key, entry.user), []) if r.array_id == array_id]
        try:
            for name in job_owners.living_names(records, entry.observation.name or slurm_job_name(key)):
                self._adapter.cancel(name, array_id, first, last, entry.user)
        except SlurmError as error:
            self._asked_to_cancel.pop(asked, None)
            log.warning("cannot cancel: %s", error, extra={"key": key, "slurm_job": array_id})
            return False
        return True

    def _sweep(self, rest: Sequence[TaskRecord]) -> None:
        """Cancel arrays whose pool is over. Leave those with unknown keys alone: another bridge may own them.

        ``rest``: the records that belong to no pool.
        """
        outside = {(r.user, r.array_id): r.name for r in rest if not meaning(r.state).over}
        for (key, user), records in self._pools.items():
            living = {record.array_id for record in records if not meaning(record.state).over}
            if not living:
                continue
            entry = self._journal.get(key)
            if entry is None or entry.user != user:
                outside |= {(user, r.array_id): r.name for r in records if r.array_id in living}
                # This includes jobs that one local user has named like another user's pool: they are not touched.
                if (key, user) not in self._reported_foreign:
                    self._reported_foreign.add((key, user))
                    why = "the journal has no such pool" if entry is None else f"it belongs to {user or 'the bridge'!r}"
                    log.warning("ignoring an array that is named like a pool: %s", why, extra={"key": key})
            elif entry.state.over:
                for array_id in living:
                    self._cancel(entry, array_id, extra=True)

        self._count_outside(outside)

    def _count_outside(self, jobs: Mapping[tuple[str, int], str]) -> None:
        """Report jobs that the bridge did not submit of users whose jobs it submits: the policy does not limit them."""
        for user in {"", *self._users}:
            who = user or user_name({})
            found = {job: name for (owner, job), name in jobs.items() if owner == user}
            self._metrics.jobs_without_pool.labels(who).set(len(found))
            if found and user not in self._outside:
                job, name = min(found.items())
                log.warning(
                    "%d jobs of %s belong to no pool, such as job %d, %r: the policy does not limit them",
                    len(found), who, job, name,
                )  # fmt: skip
        self._outside = {user for user, _ in jobs}

    def _unreachable(self, followed: Sequence[Entry], error: SlurmError) -> float:
        self._failures += 1
        self._metrics.lookup_failures.inc()
        self._metrics.slurm_up.set(0)
        log.warning("Slurm does not answer: %s", error)
        if self._failures >= _FAILURES_BEFORE_STALE:
            for entry in followed:
                if not entry.stale:
                    self._change(entry, stale=f"Slurm does not answer: {error}")
        return backoff.delay(min(self._failures, 7), self._policy.slurm.poll_seconds, _LONGEST_PAUSE)

    def _reachable(self) -> None:
        if self._failures:
            log.info("Slurm answers again")
        self._failures = 0
        self._metrics.slurm_up.set(1)
        self._metrics.last_poll.set(self._clock())

    def _finish(self, entry: Entry, state: State, message: str, observation: Observation) -> None:
        changed = self._change(
            entry, state=state, message=message, observation=observation, finished_at=self._clock(), stale=""
        )
        if changed is None:
            return
        log.info("pool ended: %s", message or state, extra={"key": entry.key, "state": str(state)})
        self._departures.collect(entry, last=True)
        self._auditor.ended(entry, state, message)
        self._lookup.forget(entry.key)
        self._task_files.forget(entry.key)
        for asked in [asked for asked in self._asked_to_cancel if asked[0] == entry.key]:
            del self._asked_to_cancel[asked]
        forget_credentials(self._policy, entry.key, entry.user)

    def _change(self, entry: Entry, **changes: object) -> Entry | None:
        """Record changes, unless the pool's state changed meanwhile. Make no new version if nothing differs."""
        with self._journal.transaction():
            current = self._journal.get(entry.key)
            if current is None or current.state is not entry.state:
                return None
            if (current.cancel and not entry.cancel) or current.kept_replicas != entry.kept_replicas:
                # It was cancelled or shrunk after this pass began: the next pass takes that into account.
                return None
            if all(getattr(current, name) == value for name, value in changes.items()):
                return current
            return self._journal.update(entry.key, **changes)

    def _count(self, live: Sequence[Entry]) -> None:
        states: dict[str, int] = defaultdict(int)
        tasks: dict[str, int] = defaultdict(int)
        for entry in live:
            states[str(entry.state)] += 1
            if entry.state is State.SUBMITTED:
                spec = entry.pool_spec()
                seen = by_client(entry.observation, spec)
                for what, number in seen.counts(spec.replicas).items():
                    tasks[what.value] += number
        self._metrics.count(self._metrics.pools, [str(state) for state in State if not state.over], states)
        self._metrics.count(self._metrics.tasks, [what.value for what in Meaning], tasks)
