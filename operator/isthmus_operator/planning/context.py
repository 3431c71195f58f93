"""The plan while it is being made: what its parts read, and where they put what they decide."""

import datetime as dt
from dataclasses import dataclass, field
from typing import Literal

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason

from ..render.defaults import NONE, JobDefaults
from ..state.job_record import Record
from ..state.observed import Job, Observed, PoolProblem, Refusal
from .actions import Action, Emit

# Events of one pass: a thousand clients that fail alike are told once each up to here, and then counted.
MAX_EVENTS = 10


@dataclass(frozen=True)
class PlanOptions:
    """What the operator's flags set."""

    cluster: str = "cluster"
    resync: float = 3.0
    idle: float = 600.0
    site_give_up: float = 3600.0
    grace: float = 30.0  # for clients to end by themselves once training is complete
    starts_per_pass: int = 200
    aggregator_crashes: int = 8  # in a row, without a completed round
    network_policies: bool = False
    identity: str = "operator"  # what it calls itself: see ownership.py
    namespace: str = ""  # the operator's own, where it runs in the cluster
    allowed: frozenset[str] = frozenset()  # what pod templates may ask for beyond the restricted standard
    defaults: JobDefaults = NONE  # the admin's, under what manifests say


@dataclass(frozen=True)
class JobResult:
    """The job is over."""

    outcome: Literal["Complete", "Failed"]
    reason: Reason
    message: str


@dataclass
class PoolOutcome:
    """What a part of the plan found out about one pool."""

    name: str
    desired: int
    queued: int = 0
    failed: int = 0
    reason: str = ""
    warn: bool = False  # the reason keeps clients from starting, or from staying: worth an event
    jobs: list[str] = field(default_factory=list)
    attempt: int = 0
    possible: int = 0  # clients that are there or may yet come
    blocked: Reason | None = None  # why the rest will not


@dataclass
class PlanContext:
    """One pass over one job."""

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
    volume_lost: bool = False  # with the rounds that were on it
    starts: int = 0  # client pods that this pass makes

    def requeue_after(self, seconds: float) -> None:
        """Looks again no later than that."""
        self.requeue = max(0.1, min(self.requeue, seconds))

    def requeue_at(self, moment: dt.datetime) -> None:
        """Looks again no later than then."""
        self.requeue_after((moment - self.now).total_seconds())

    def reached(self, moment: dt.datetime) -> bool:
        """Whether the moment has come; if not, looks again when it has."""
        if self.now >= moment:
            return True
        self.requeue_at(moment)
        return False

    def elapsed(self, since: dt.datetime, pause: dt.timedelta) -> bool:
        """Whether a pause is over; if not, looks again when it is. One that has yet to begin was noted before a clock
        was put back, and is over."""
        return since > self.now or self.reached(since + pause)

    def emit(self, type_: Literal["Normal", "Warning"], reason: Reason, message: str) -> None:
        """Adds an event, up to a bound."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(Emit(type_, reason, message))
        else:
            self.suppressed_events += 1

    def refused(self, key: str) -> bool:
        """Whether the API server refused this object a moment ago; looks again when it may be tried anew."""
        refusal = self.observed.refusals.get(key)
        return refusal is not None and not self._due(refusal)

    def may_call_site(self, part: str) -> bool:
        """Whether a pool's site may be asked for something; looks again when it may."""
        problem = self.observed.problems.get(part)
        return problem is None or self._due(problem)

    def _due(self, trouble: Refusal | PoolProblem) -> bool:
        if trouble.due(self.now):
            return True
        self.requeue_at(trouble.retry_at)
        return False
