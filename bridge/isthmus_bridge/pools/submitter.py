"""Submission of recorded pools to Slurm. No other module submits jobs."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.parties import PartyError

from ..batch import batch_script
from ..clients_per_job import jobs_for, per_job
from ..metrics import Metrics
from ..parties import party_files
from ..policy.authorization import Denial, Grant, decide, draining
from ..policy.current import CurrentPolicy
from ..policy.policy import Policy
from ..slurm.model import Patience, SlurmAdapter, SlurmError, Submission, SubmissionAmbiguous, SubmissionRefused
from ..users.pool_directory import PoolDirectory, pool_directory
from ..users.user_checks import fault
from .audit_events import Auditor
from .journal import Entry, Journal, State

log = logging.getLogger(__name__)

# Pause before a submission is retried that Slurm refuses for now (a submit limit, a full queue, a drained partition).
RETRY_SECONDS = 30.0
_HOUR = 3600.0
# The warning comes at most this fraction (1/3) of the time limit before the end.
_LARGEST_WARNING_SHARE = 3


class Submitter:
    """The step of pools from RESERVED to SUBMITTED. ``advance`` may be called for any key, from any thread."""

    def __init__(
        self,
        current_policy: CurrentPolicy,
        journal: Journal,
        adapter: SlurmAdapter,
        metrics: Metrics,
        auditor: Auditor,
        clock: Callable[[], float],
    ) -> None:
        self._current_policy = current_policy
        self._journal = journal
        self._adapter = adapter
        self._metrics = metrics
        self._auditor = auditor
        self._clock = clock
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    @property
    def _policy(self) -> Policy:
        return self._current_policy.policy

    def advance(self, key: str) -> None:
        """Submit the pool if it is RESERVED. At most one thread at a time works on a key."""
        with self._claimed(key) as mine:
            if mine:
                self._advance(key)

    def busy(self, key: str) -> bool:
        """Return whether a thread is working on that key."""
        with self._lock:
            return key in self._busy

    def _advance(self, key: str) -> None:
        entry = self._journal.get(key)
        if entry is None or entry.state is not State.RESERVED:
            return
        if entry.cancel:
            self._finish(entry, State.CANCELLED, entry.message)
            return
        # A retry that is further away was recorded before the clock was set back.
        if 0 < entry.retry_at - self._clock() <= RETRY_SECONDS:
            return
        spec = entry.pool_spec()
        if (denial := self._drained(entry)) is not None:
            self._defer(entry, str(denial))
            return
        # Decide again: the policy may have changed since the pool was recorded.
        grant = self._decide(entry, spec)
        if isinstance(grant, Denial):
            job = f"{spec.namespace}/{spec.job}"
            self._auditor.denied(entry.identity, grant, key=key, job=job, pool=spec.pool)
            self._finish(entry, State.FAILED, str(grant))
            return
        try:
            run = pool_directory(self._policy, key, entry.user)
            # The policy may have become stricter since the pool was recorded.
            if trust := party_files.renewed(self._policy, spec):
                run.write_credentials(trust)
            run.write_code(spec.code)
            client = batch_script.render(key, spec, grant, run.path, run.tls)
            if per_job(spec) == 1:
                run.write_scripts(client)
            else:
                run.write_scripts(batch_script.render_job(key, spec, grant.gres, run.client_script), client)
        except OSError as error:
            self._defer(entry, f"cannot write the pool's files: {error.strerror}")
            return
        except PartyError as error:
            self._defer(entry, f"cannot make the clients' trust file: {error}")
            return
        if self._record_intent(key, entry.kept_replicas):
            self._submit(key, submission(self._policy, key, entry.identity, spec, grant, run))

    def _drained(self, entry: Entry) -> Denial | None:
        """Return the drain that makes this pool wait, or ``None``."""
        known = (identity for identity in self._policy.identities if identity.uri == entry.identity)
        return next((denial for identity in known if (denial := draining(self._policy, identity))), None)

    def _decide(self, entry: Entry, spec: pb.PoolSpec) -> Grant | Denial:
        for identity in self._policy.identities:
            if identity.uri == entry.identity:
                if (identity.user or "") != entry.user:
                    # The pool's files belong to the recorded user.
                    was, now = entry.user or "the bridge's own user", identity.user or "the bridge's own user"
                    return Denial(
                        "identities.user", f"the pool was recorded for {was!r}; now {identity.uri} is {now!r}"
                    )
                if entry.user and (why := fault(entry.user)):
                    return Denial("identities.user", f"{why}; the policy maps {identity.uri} to this user")
                return decide(self._policy, identity, spec)
        return Denial("identities", f"{entry.identity!r} is no longer known at this site")

    def _record_intent(self, key: str, kept_replicas: int) -> bool:
        """Record durably that sbatch is about to run. Return False if the pool was cancelled or shrunk meanwhile."""
        with self._journal.transaction():
            entry = self._journal.get(key)
            if (
                entry is None
                or entry.state is not State.RESERVED
                or entry.cancel
                or entry.kept_replicas != kept_replicas
            ):
                return False
            self._journal.update(key, state=State.SUBMITTING, submissions=entry.submissions + 1)
        return True

    def _submit(self, key: str, submission: Submission) -> None:
        try:
            array_id = self._adapter.submit(submission)
        except SubmissionRefused as error:
            self._refused(key, error)
        except Exception as error:
            # After any error, the request may have reached Slurm.
            if not isinstance(error, SlurmError):
                log.exception("submission failed unexpectedly", extra={"key": key})
            self._mark_unknown(key, error)
        else:
            self._metrics.submissions.labels("accepted").inc()
            with self._journal.transaction():
                entry = self._journal.get(key)
                assert entry is not None
                self._journal.update(
                    key, state=State.SUBMITTED, array_id=array_id, submitted_at=self._clock(), unknown_since=0.0,
                    missed_lookups=0, message=entry.message if entry.cancel else "",
                )  # fmt: skip
            log.info(
                "submitted as job %d", array_id,
                extra={"key": key, "slurm_job": array_id, "caller": entry.identity},
            )  # fmt: skip

    def _mark_unknown(self, key: str, error: Exception) -> None:
        """Record that only a look-up can tell whether the submission succeeded."""
        self._metrics.submissions.labels("ambiguous").inc()
        waiting = isinstance(error, SubmissionAmbiguous) and error.waiting
        entry = self._journal.get(key)
        assert entry is not None
        # A full queue is not a failed submission, so it does not count towards the limit of submissions.
        submissions = entry.submissions - 1 if waiting and self._may_retry(entry, Patience.QUEUE) else entry.submissions
        self._journal.update(
            key, state=State.UNKNOWN, unknown_since=self._clock(), missed_lookups=0, submissions=submissions,
            message=str(error) if waiting else f"looking for the array in Slurm: {error}",
        )  # fmt: skip
        log.warning("submission is ambiguous: %s", error, extra={"key": key})

    def _may_retry(self, entry: Entry, patience: Patience) -> bool:
        """Return whether a refused submission is to be retried."""
        if patience is Patience.NONE:
            return False
        longest = _HOUR
        if patience is Patience.QUEUE:
            longest = entry.pool_spec().max_queue_seconds or _HOUR
        return self._clock() < entry.created_at + longest

    def _refused(self, key: str, error: SubmissionRefused) -> None:
        entry = self._journal.get(key)
        assert entry is not None
        if self._may_retry(entry, error.patience):
            self._metrics.submissions.labels("deferred").inc()
            self._defer(entry, str(error))
        else:
            self._metrics.submissions.labels("refused").inc()
            self._finish(entry, State.FAILED, str(error))

    def _defer(self, entry: Entry, message: str) -> None:
        log.warning("submission deferred: %s", message, extra={"key": entry.key, "caller": entry.identity})
        self._journal.update(entry.key, state=State.RESERVED, retry_at=self._clock() + RETRY_SECONDS, message=message)

    def _finish(self, entry: Entry, state: State, message: str) -> None:
        self._journal.update(entry.key, state=state, message=message, finished_at=self._clock())
        log.info(
            "pool ended: %s",
            message or state,
            extra={"key": entry.key, "state": str(state), "caller": entry.identity},
        )
        self._auditor.ended(entry, state, message)
        forget_credentials(self._policy, entry.key, entry.user)

    @contextmanager
    def _claimed(self, key: str) -> Iterator[bool]:
        with self._lock:
            mine = key not in self._busy
            self._busy.add(key)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._busy.discard(key)


def forget_credentials(policy: Policy, key: str, user: str) -> None:
    """Remove a finished pool's credentials; log a failure, which housekeeping retries within the hour."""
    try:
        pool_directory(policy, key, user).forget_credentials()
    except OSError as error:
        log.error("cannot remove the pool's credentials: %s", error.strerror or error, extra={"key": key})


def warning_seconds(policy: Policy, spec: pb.PoolSpec) -> int:
    """Return how many seconds before its time limit a task of this pool is warned."""
    return min(policy.slurm.warning_seconds, spec.time_limit_seconds // _LARGEST_WARNING_SHARE)


def submission(
    policy: Policy, key: str, caller: str, spec: pb.PoolSpec, grant: Grant, run: PoolDirectory
) -> Submission:
    """Return the submission of a pool that the policy has granted to that caller."""
    share = per_job(spec)
    return Submission(
        name=slurm_job_name(key),
        script=run.script,
        directory=run.path,
        output=run.log_pattern if share == 1 else run.job_log_pattern,
        tasks=jobs_for(spec),
        steps=share,
        at_once=grant.running_tasks // share,
        comment=batch_script.comment(spec, caller),
        partition=grant.partition,
        account=grant.account,
        qos=grant.qos,
        time_limit_seconds=spec.time_limit_seconds,
        warning_seconds=warning_seconds(policy, spec),
        cpus_per_task=spec.cpus_per_task,
        memory_mib=share * spec.memory_mib,
        gres=tuple(replace(one, count=share * one.count) for one in grant.gres),
        user=grant.user,
        guard=run.guard,
        options=grant.options,
    )
