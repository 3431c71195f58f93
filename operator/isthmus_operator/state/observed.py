"""What the operator saw: immutable views, cut down to what the plan looks at."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.api.hpc_site import HpcSiteSpec

from .job_record import ROOM

ENDED_PHASES = ("Succeeded", "Failed")
"""Of a pod."""


@dataclass(frozen=True, slots=True)
class Job:
    """A FederatedJob as the API server holds it."""

    name: str
    namespace: str
    uid: str
    generation: int
    created: dt.datetime
    spec: Mapping[str, Any]
    status: Mapping[str, Any] = field(default_factory=dict)
    record: str = ""  # the annotation, as it stands
    record_room: int = ROOM  # bytes that it may have
    operator: str = ""  # likewise
    log_request: str = ""  # likewise
    names: str = ""  # likewise
    old_names: bool = False  # its pools' objects have names without hashes
    queue: str = ""  # Kueue's
    finalizers: tuple[str, ...] = ()
    deleted: dt.datetime | None = None
    resource_version: str = ""


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod of a job."""

    name: str
    uid: str
    role: str
    pool: str = ""
    index: int = 0
    attempt: int = 0
    phase: str = "Pending"  # Succeeded or Failed as soon as its program has ended
    lingers: bool = False  # its program has ended, and a container beside it lives on
    deleting: bool = False
    overdue: dt.datetime | None = None  # when it should have been gone, where it is being deleted
    ready: bool = False
    created: dt.datetime | None = None
    finished: dt.datetime | None = None  # when its main container ended
    exit_code: int | None = None
    reason: str = ""  # why it ended: Evicted, OOMKilled, Error, ...
    message: str = ""  # its termination message
    disrupted: bool = False  # ended by the cluster, not by its own doing
    waiting: str = ""  # why it does not run yet
    placed: dt.datetime | None = None  # when it got its node, while none of its containers has started
    mounts: tuple[str, ...] = ()  # likewise: what its template mounts, such as ``Secret token``
    restarts: int = 0
    last_exit_code: int | None = None  # of the container's previous run
    last_message: str = ""
    ip: str = ""
    host_ip: str = ""
    node: str = ""
    authority: str = ""
    resource_version: str = ""

    @property
    def ended(self) -> bool:
        """True if its program is over for good."""
        return self.phase in ENDED_PHASES

    def ended_at(self, now: dt.datetime) -> dt.datetime:
        """Return when it ended, as far as that is known."""
        return self.finished or self.created or now

    @property
    def active(self) -> bool:
        """True if any of it runs or may yet run, and it is not being deleted."""
        return (self.lingers or not self.ended) and not self.deleting


@dataclass(frozen=True, slots=True)
class ServiceView:
    """The aggregator's Service."""

    cluster_ip: str = ""
    node_port: int = 0
    ingress: str = ""  # host or address of the load balancer


class PoolPhase(StrEnum):
    """The bridge's phases, and ABSENT: the site knows no such key."""

    ABSENT = "ABSENT"
    SUBMITTING = "SUBMITTING"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class PoolView:
    """What the site said about one attempt of an HPC pool."""

    attempt: int
    phase: PoolPhase
    message: str = ""
    job_id: str = ""
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    reason: str = ""
    expected_start: float = 0.0
    submitted_at: float = 0.0
    failure: str = ""  # the last lines of a failed task
    timed_out: bool = False  # its time limit ended it
    displaced: bool = False  # every task that failed was preempted, or lost its node
    desired: int = 0  # its clients, less those that a shrinking ended
    ends_at: float = 0.0  # when the time limit ends the first of its clients

    @property
    def ended(self) -> bool:
        """True if nothing of it is left in the queue or on a node."""
        return self.phase in (PoolPhase.SUCCEEDED, PoolPhase.FAILED, PoolPhase.CANCELLED)


# Seconds before what failed is tried again, at most.
LONGEST_RETRY = 60.0


class ProblemKind(StrEnum):
    """Why a site gave no answer, or not the one that was asked for."""

    UNREACHABLE = "unreachable"
    DENIED = "denied"
    REFUSED = "refused"  # the site finds the request malformed


@dataclass(frozen=True, slots=True)
class PoolProblem:
    """The newest trouble with a pool's site; gone once a call succeeds."""

    kind: ProblemKind
    message: str
    retry_at: dt.datetime
    # PolicyDenied also for a temporary denial (a drained site, an exhausted total), which is retried like an outage.
    reason: Reason = Reason.SITE_UNREACHABLE

    def due(self, now: dt.datetime) -> bool:
        """Return whether it may be tried again."""
        return _due(self.retry_at, now)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An object could not be made."""

    message: str
    retry_at: dt.datetime
    by_operator: bool = False  # the operator refused it itself; else the API server did

    def due(self, now: dt.datetime) -> bool:
        """Return whether it may be tried again."""
        return _due(self.retry_at, now)


def _due(retry_at: dt.datetime, now: dt.datetime) -> bool:
    # One that seems further away than any pause is long was noted before a clock was put back.
    return not now < retry_at <= now + dt.timedelta(seconds=LONGEST_RETRY)


@dataclass(frozen=True, slots=True)
class Metric:
    """A value that the aggregator reports."""

    name: str
    value: float
    round: int


@dataclass(frozen=True, slots=True)
class ModelView:
    """A committed model: the newest, or the best."""

    path: str
    round: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PrivacyView:
    """What differential privacy has cost."""

    epsilon: float
    delta: float
    rounds: int
    spent: bool = False  # another round would pass the budget


@dataclass(frozen=True, slots=True)
class FederationView:
    """What the aggregator says of the training."""

    phase: str  # the name of a FederationStatus.Phase
    message: str = ""
    current_round: int = 0
    completed_rounds: int = 0
    total_rounds: int = 0
    connected: Mapping[str, int] = field(default_factory=dict)  # clients by pool
    failures: Mapping[str, str] = field(default_factory=dict)  # the newest by pool
    metrics: tuple[Metric, ...] = ()
    best: Metric | None = None
    model: ModelView | None = None
    best_model: ModelView | None = None
    privacy: PrivacyView | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything around a job at one moment."""

    pods: tuple[PodView, ...] = ()
    accepted: FederatedJobSpec | None = None  # from the job's ConfigMap
    present: frozenset[str] = frozenset()  # names of other objects that exist and are this job's: Kind/name
    live: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of these: metadata and spec, by Kind/name
    adoptable: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # likewise: another job's claim, offered
    vanished: frozenset[str] = frozenset()  # Kind/name of those that were there, and are not any more
    # By Kind/name: the fields that the API server does not keep as they were applied.
    unmendable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    code: tuple[str, ...] = ()  # names of the files of task.code
    forbidden_references: tuple[str, ...] = ()  # what templates name and may not, with the reasons
    conflicting: tuple[str, ...] = ()  # Kind/name of objects that bear our names and are not this job's
    authority: str = ""  # fingerprint of the job's CA; empty: there is none
    authority_ends: bool = False  # soon
    certificates: Mapping[str, str] = field(default_factory=dict)  # by Secret: those that are good for a while
    delivered: Mapping[str, str] = field(default_factory=dict)  # by key: the certificate that the pool's site has
    service: ServiceView | None = None
    node_address: str = ""  # of the aggregator's node
    sites: Mapping[str, HpcSiteSpec] = field(default_factory=dict)
    leaving_sites: frozenset[str] = frozenset()  # deleted, and still held: nothing new is submitted there
    pools: Mapping[str, PoolView] = field(default_factory=dict)
    problems: Mapping[str, PoolProblem] = field(default_factory=dict)
    refusals: Mapping[str, Refusal] = field(default_factory=dict)  # by Kind/name
    # Asked last, after everything above was seen: clients end once the aggregator is complete, so it is not concluded
    # from their end that they are missing.
    federation: FederationView | None = None
    federation_error: str = ""  # why the aggregator did not answer
