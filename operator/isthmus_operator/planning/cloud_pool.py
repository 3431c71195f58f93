"""Planning of cloud pools: one pod per client, restarted within limits."""

import datetime as dt
from collections.abc import Sequence

from isthmus_contracts.api.federated_job import Pool
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.process import backoff

from .. import names
from ..render import kueue
from ..render.client import ClientPods
from ..state.job_record import ClientRecord, CloudRecord
from ..state.observed import PodView
from ..text import exited, killed, last_lines, plural
from . import bursting
from .actions import CreatePod, DeletePod
from .context import PlanContext, PoolOutcome
from .start_problems import why_not_started

_FIRST_DELAY = 5.0  # seconds before the first restart after a failure; doubled each time
_LONGEST_DELAY = 300.0
_PATIENCE = dt.timedelta(seconds=60)  # after a pod's grace period
_LEFT = (
    "ended with exit code 0 before training was complete, again: its command must keep running until training is"
    " complete (task.command, or the command in the pool's template)"
)


def restart_delay(times: int) -> dt.timedelta:
    """Return the delay before the ``times``-th restart after a failure."""
    return dt.timedelta(seconds=backoff.delay(times, _FIRST_DELAY, _LONGEST_DELAY))


def plan_cloud_pool(context: PlanContext, pool: Pool, ready_to_start: bool) -> PoolOutcome:
    """Plan the pods of one cloud pool of a job that is to run."""
    return _CloudPool(context, pool, ready_to_start).plan()


def _words(pod: PodView) -> str:
    """Return why a pod failed: its termination message, with the cluster's reason unless that is just "Error"."""
    label = pod.reason if pod.reason not in ("", "Error") else killed(pod.exit_code)
    words = last_lines(pod.message)
    return ": ".join(filter(None, (label, words))) or exited(pod.exit_code)


class _CloudPool:
    def __init__(self, context: PlanContext, pool: Pool, ready_to_start: bool) -> None:
        self.context = context
        self.pool = pool
        self.can_start = ready_to_start
        self.record = context.record.cloud.setdefault(pool.name, CloudRecord())
        self.size = bursting.wanted(context, pool, self.record)
        self.members = kueue.members(context.spec).get(pool.name, 0)
        self.outcome = PoolOutcome(pool.name, desired=self.size, possible=max(self.size, pool.replicas))
        self._pods: ClientPods | None = None
        self._newest_failure: tuple[dt.datetime, str] | None = None
        self._waiting = ""
        self._refused = ""
        self._left = ""

    def plan(self) -> PoolOutcome:
        by_index: dict[int, list[PodView]] = {}
        for pod in self.context.observed.pods:
            if pod.role == names.ROLE_CLIENT and pod.pool == self.pool.name:
                by_index.setdefault(pod.index, []).append(pod)
        for index in range(self.size):
            pods = sorted(by_index.pop(index, ()), key=lambda pod: pod.attempt)
            self._client(index, pods)
        for surplus in by_index.values():
            self._delete(surplus)
        if self.record == CloudRecord():
            del self.context.record.cloud[self.pool.name]
        outcome = self.outcome
        # What keeps clients from starting takes precedence over the last failure.
        failure = (self._newest_failure or (None, ""))[1]
        outcome.reason = self._refused or self._waiting or failure or self._left
        outcome.warn = bool(outcome.reason) and outcome.reason != failure
        if outcome.possible < max(outcome.desired, self.pool.replicas):
            outcome.blocked = Reason.QUORUM_IMPOSSIBLE
        return outcome

    def _client(self, index: int, pods: Sequence[PodView]) -> None:
        context, entry = self.context, self.record.client(index)
        newest = pods[-1] if pods else None
        self._delete_obsolete(pods)
        for pod in pods:
            self._note_failure(pod)
            # At the first attempt, the job may just have completed.
            if pod.phase == "Succeeded" and pod.attempt > 0 and not pod.disrupted:
                self._left = f"{pod.name} {_LEFT}"
        if newest is not None and newest.attempt > entry.attempt:
            # The pod was started by an operator whose record was lost.
            entry = self._entry(index)
            entry.attempt = newest.attempt
        if newest is not None and newest.phase == "Failed" and not newest.deleting:
            self._count_failure(index, newest)
            entry = self.record.client(index)
        if entry.failures > context.spec.backoff_limit:
            self.outcome.possible -= 1
            self.outcome.failed += 1
            return
        if newest is None:
            fresh = index >= self.record.started
            refused = f"Pod/{names.client(context.job, self.pool.name, index, entry.attempt)}"
            self.outcome.queued += 1
            # A pod that the API server refused never existed, so its number is still free.
            self._start(index, entry.attempt if fresh or refused in context.observed.refusals else entry.attempt + 1)
        elif newest.deleting:
            self.outcome.queued += 1
            if not self._holds_place(index, newest):
                self._start(index, newest.attempt + 1)
        elif newest.ended:
            self._restart(index, newest, entry)
        else:
            if context.observed.authority and newest.authority != context.observed.authority:
                # Its certificate is signed by another CA, so it cannot join. This does not count as a failure.
                context.actions.append(DeletePod(newest.name, newest.uid))
            if newest.phase == "Pending":
                self.outcome.queued += 1
                self._waiting = self._waiting or why_not_started(context, newest)

    def _holds_place(self, index: int, pod: PodView) -> bool:
        """Return True if a pod that is being deleted still counts in Kueue's group, which a new one would exceed."""
        context = self.context
        if not context.job.queue or pod.ended or not pod.node or index >= self.members:
            return False
        # A pod on a lost node is not removed by itself.
        return pod.overdue is None or not context.reached(pod.overdue + _PATIENCE)

    def _delete_obsolete(self, pods: Sequence[PodView]) -> None:
        """Delete all pods of a client but the newest and, for its log, the last one that ended.

        An ended pod whose sidecars still use resources is deleted as well.
        """
        if len(pods) < 2:
            return
        ended = [pod for pod in pods if pod.ended and not pod.lingers]
        kept = {pods[-1].uid} | ({ended[-1].uid} if ended else set())
        self._delete([pod for pod in pods if pod.uid not in kept])

    def _note_failure(self, pod: PodView) -> None:
        moment = pod.ended_at(self.context.now)
        if pod.phase == "Failed" and (self._newest_failure is None or moment > self._newest_failure[0]):
            self._newest_failure = (moment, f"{pod.name}: {_words(pod)}")

    def _count_failure(self, index: int, pod: PodView) -> None:
        if pod.disrupted or self.record.client(index).counted >= pod.attempt:
            return
        entry = self._entry(index)
        entry.counted = pod.attempt
        entry.failures += 1
        left = self.context.spec.backoff_limit - entry.failures + 1
        then = f"{plural(left, 'restart')} left" if left > 0 else "it is out of restarts"
        self.context.emit("Warning", Reason.CLIENT_FAILED, f"{pod.name} failed; {then}: {_words(pod)}")

    def _restart(self, index: int, pod: PodView, entry: ClientRecord) -> None:
        """Restart a client after a delay, which also lets a job that just completed report that first."""
        if pod.phase == "Failed":
            self.outcome.failed += 1
            times = entry.failures if not pod.disrupted else 1
        else:
            times = pod.attempt + 1
        if self.context.elapsed(pod.ended_at(self.context.now), restart_delay(times)):
            # Kueue counts a pod that ended with 0 as one of its group, and would delete another in its place.
            self._start(index, pod.attempt + 1, alone=pod.phase == "Succeeded")

    def _start(self, index: int, attempt: int, *, alone: bool = False) -> None:
        context = self.context
        if not self.can_start:
            return
        name = names.client(context.job, self.pool.name, index, attempt)
        refusal = context.observed.refusals.get(f"Pod/{name}")
        if refusal is not None:
            self._refused = f"the API server refused {name}: {refusal.message}"
        if context.refused(f"Pod/{name}"):
            return
        if context.starts >= context.options.starts_per_pass:
            # The next pass continues here; no client with a higher index may be started before.
            self.can_start = False
            context.requeue_after(0.1)
            return
        if attempt > self.record.floor:
            self._entry(index).attempt = attempt
        if index >= self.record.started:
            self.record.started = index + 1
        if self._pods is None:
            seen = context.observed
            self._pods = ClientPods(
                context.job, context.spec, self.pool, seen.authority, seen.code, context.options.defaults
            )
        context.starts += 1
        context.actions.append(CreatePod(self._pods.pod(index, attempt, alone=alone)))

    def _entry(self, index: int) -> ClientRecord:
        return self.record.clients.setdefault(index, self.record.client(index))

    def _delete(self, pods: Sequence[PodView]) -> None:
        self.context.actions += [DeletePod(pod.name, pod.uid) for pod in pods if not pod.deleting]
