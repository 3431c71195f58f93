"""The shared context of one planning pass: its inputs, and the actions and events collected so far."""

import datetime as dt
from dataclasses import dataclass, field
from typing import Literal

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason

from ..render.defaults import NONE, JobDefaults
from ..state.job_record import ArrayKey, Record
from ..state.observed import Job, Observed, PoolProblem, Refusal
from .actions import Action, Emit

# Events of one pass. Further ones are counted, so that a thousand failing clients do not cause a thousand events.
MAX_EVENTS = 10


@dataclass(frozen=True)
class PlanOptions:
    """The options of planning: from the operator's flags, and constants that only tests change."""

    cluster: str = "cluster"
    resync: float = 3.0
    idle: float = 600.0
    site_give_up: float = 3600.0
    grace: float = 30.0  # for clients to exit by themselves once training is complete
    starts_per_pass: int = 200
    aggregator_crashes: int = 8  # in a row, without a completed round
    network_policies: bool = False
    identity: str = "operator"  # the operator's identity, see controllers/ownership.py
    namespace: str = ""  # the operator's own, if it runs in the cluster
    allowed: frozenset[str] = frozenset()  # exceptions from the restricted standard for pod templates
    defaults: JobDefaults = NONE  # the admin's job defaults, which manifests override


@dataclass(frozen=True)
class JobResult:
    """The result of a job that is over."""

    outcome: Literal["Complete", "Failed"]
    reason: Reason
    message: str


@dataclass
class PoolOutcome:
    """The state of one pool in this pass."""

    name: str
    desired: int
    queued: int = 0
    failed: int = 0
    reason: str = ""
    warn: bool = False  # the reason keeps clients from running, and is worth an event
    jobs: list[str] = field(default_factory=list)
    attempt: int = 0
    possible: int = 0  # clients that take part or still may
    blocked: Reason | None = None  # why the others cannot


@dataclass
class PlanContext:
    """One planning pass over one job."""

    job: Job
    observed: Observed
    now: dt.datetime
    options: PlanOptions
    spec: FederatedJobSpec
    record: Record
    actions: list[Action] = field(default_factory=list)
    events: list[Emit] = field(default_factory=list)
    requeue: float = 600.0
    suppressed_events: int = 0
    volume_lost: bool = False  # together with the rounds stored on it
    starts: int = 0  # client pods created by this pass

    def requeue_after(self, seconds: float) -> None:
        """Reconcile again after at most that many seconds."""
        self.requeue = max(0.1, min(self.requeue, seconds))

    def requeue_at(self, moment: dt.datetime) -> None:
        """Reconcile again at that time at the latest."""
        self.requeue_after((moment - self.now).total_seconds())

    def reached(self, moment: dt.datetime) -> bool:
        """Return True if the time has come; otherwise schedule a pass for it and return False."""
        if self.now >= moment:
            return True
        self.requeue_at(moment)
        return False

    def elapsed(self, since: dt.datetime, pause: dt.timedelta) -> bool:
        """Return True if a pause is over; otherwise schedule a pass for its end and return False.

        A pause that starts in the future was stored before a clock was set back, and counts as over.
        """
        return since > self.now or self.reached(since + pause)

    def emit(self, type_: Literal["Normal", "Warning"], reason: Reason, message: str) -> None:
        """Add an event, up to ``MAX_EVENTS``."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(Emit(type_, reason, message))
        else:
            self.suppressed_events += 1

    def refused(self, key: str) -> bool:
        """Return True if the object was refused and may not be retried yet; then schedule a pass for the retry."""
        refusal = self.observed.refusals.get(key)
        return refusal is not None and not self._due(refusal)

    def may_call_site(self, array: ArrayKey) -> bool:
        """Return True if the array's site may be called; otherwise schedule a pass for the retry and return False."""
        problem = self.observed.problems.get(array)
        return problem is None or self._due(problem)

    def _due(self, trouble: Refusal | PoolProblem) -> bool:
        if trouble.due(self.now):
            return True
        self.requeue_at(trouble.retry_at)
        return False
