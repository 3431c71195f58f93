"""Immutable views of observed objects, reduced to what the plan reads."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.api.hpc_site import HpcSiteSpec

from .job_record import ROOM, ArrayKey, Record

ENDED_PHASES = ("Succeeded", "Failed")
"""Phases of a pod whose program has ended."""


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
    phase: str = "Pending"  # Succeeded or Failed as soon as its main program has ended
    lingers: bool = False  # its main program has ended, but a sidecar still runs
    deleting: bool = False
    overdue: dt.datetime | None = None  # when a pod that is being deleted should have been gone
    ready: bool = False
    created: dt.datetime | None = None
    finished: dt.datetime | None = None  # when its main container ended
    exit_code: int | None = None
    reason: str = ""  # why it ended: Evicted, OOMKilled, Error, ...
    message: str = ""  # its termination message
    disrupted: bool = False  # ended by the cluster rather than by its own failure
    waiting: str = ""  # reason why it does not run yet
    placed: dt.datetime | None = None  # when it was scheduled, as long as none of its containers has started
    mounts: tuple[str, ...] = ()  # likewise: objects that its template mounts, such as ``Secret token``
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
        """True if its main program has ended and is not restarted."""
        return self.phase in ENDED_PHASES

    def ended_at(self, now: dt.datetime) -> dt.datetime:
        """Return when it ended, or the best known substitute."""
        return self.finished or self.created or now

    @property
    def active(self) -> bool:
        """True if any container runs or may still run, and the pod is not being deleted."""
        return (self.lingers or not self.ended) and not self.deleting


@dataclass(frozen=True, slots=True)
class ServiceView:
    """The aggregator's Service."""

    cluster_ip: str = ""
    node_port: int = 0
    ingress: str = ""  # host or address of the load balancer


class PoolPhase(StrEnum):
    """The phases that a bridge reports, and ABSENT: the site does not know the key."""

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
    """The site's report on one attempt of an HPC pool's array."""

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
    timed_out: bool = False  # ended by its time limit
    displaced: bool = False  # every failed task was preempted or lost its node
    desired: int = 0  # clients, without those removed by shrinking
    ends_at: float = 0.0  # when the time limit ends its first client

    @property
    def ended(self) -> bool:
        """True if none of its tasks is queued or running."""
        return self.phase in (PoolPhase.SUCCEEDED, PoolPhase.FAILED, PoolPhase.CANCELLED)


# The longest delay before a retry. Seconds.
LONGEST_RETRY = 60.0


class ProblemKind(StrEnum):
    """The kind of a failed call to a site."""

    UNREACHABLE = "unreachable"
    DENIED = "denied"
    REFUSED = "refused"  # the site rejected the request as invalid


@dataclass(frozen=True, slots=True)
class PoolProblem:
    """The last failed call for an array; cleared when a call succeeds."""

    kind: ProblemKind
    message: str
    retry_at: dt.datetime
    # PolicyDenied also for a temporary denial (a drained site, an exhausted total), which is retried like an outage.
    reason: Reason = Reason.SITE_UNREACHABLE

    def due(self, now: dt.datetime) -> bool:
        """Return True if it may be retried."""
        return _due(self.retry_at, now)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused request for an object."""

    message: str
    retry_at: dt.datetime
    by_operator: bool = False  # the operator refused it itself; else the API server did

    def due(self, now: dt.datetime) -> bool:
        """Return True if the refused call may be retried now."""
        return _due(self.retry_at, now)


def _due(retry_at: dt.datetime, now: dt.datetime) -> bool:
    # A time further ahead than the longest pause was stored before a clock was set back.
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
    """The privacy budget spent so far."""

    epsilon: float
    delta: float
    rounds: int
    spent: bool = False  # another round would exceed the budget


@dataclass(frozen=True, slots=True)
class SecureView:
    """The newest instance of secure aggregation that ended."""

    round: int
    survivors: int
    dropouts: int
    parties: int
    clipped_ratio: float = 0.0
    message: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class FederationView:
    """The aggregator's report on the training."""

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
    secure: SecureView | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything around a job at one moment."""

    record: Record = field(default_factory=Record)  # the job's own, as stored
    pods: tuple[PodView, ...] = ()
    accepted: FederatedJobSpec | None = None  # from the job's ConfigMap
    present: frozenset[str] = frozenset()  # Kind/name of this job's other objects that exist
    live: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # metadata and spec of these, by Kind/name
    adoptable: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # likewise: another job's offered claim
    vanished: frozenset[str] = frozenset()  # Kind/name of objects that existed and are gone
    # By Kind/name: the fields that the API server does not keep as they were applied.
    unmendable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    code: tuple[str, ...] = ()  # names of the files of task.code
    forbidden_references: tuple[str, ...] = ()  # references in templates that are not allowed, with the reasons
    conflicting: tuple[str, ...] = ()  # Kind/name of objects of the job's names that belong to something else
    authority: str = ""  # fingerprint of the job's CA; empty: there is none
    authority_ends: bool = False  # soon
    certificates: Mapping[str, str] = field(default_factory=dict)  # valid certificates: version by Secret
    trust: str = ""  # with secure aggregation: the cloud clients' trust file
    trust_problem: str = ""  # why it cannot be made
    delivered: Mapping[str, str] = field(default_factory=dict)  # version of the certificate that the site has, by key
    service: ServiceView | None = None
    node_address: str = ""  # of the aggregator's node
    sites: Mapping[str, HpcSiteSpec] = field(default_factory=dict)
    leaving_sites: frozenset[str] = frozenset()  # deleted but still in use: nothing new is submitted there
    pools: Mapping[ArrayKey, PoolView] = field(default_factory=dict)
    problems: Mapping[ArrayKey, PoolProblem] = field(default_factory=dict)
    refusals: Mapping[str, Refusal] = field(default_factory=dict)  # by Kind/name
    # Queried last, after everything above was observed. Clients end once the aggregator is complete, so an older report
    # would make finished clients look as if they were missing.
    federation: FederationView | None = None
    federation_error: str = ""  # why the aggregator did not answer
