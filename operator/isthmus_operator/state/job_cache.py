"""Data of a job that is cached between two reconciliations. All of it can be rebuilt."""

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.process import backoff
from isthmus_contracts.wire.pki import Authority, Credentials

from .job_record import ArrayKey
from .observed import LONGEST_RETRY, PoolProblem, ProblemKind, Refusal, ServiceView
from .parties import ClusterParty

_FIRST_RETRY = 5.0  # seconds; doubled each time


@dataclass
class Dependents:
    """The job's objects other than pods."""

    loaded: float  # by time.monotonic()
    accepted: FederatedJobSpec | None = None
    present: frozenset[str] = frozenset()
    live: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adoptable: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vanished: frozenset[str] = frozenset()
    conflicting: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    authority: Authority | None = None
    fingerprint: str = ""  # of the authority
    authority_ends: bool = False  # soon
    certificates: Mapping[str, str] = field(default_factory=dict)
    trust: str = ""  # see Observed
    trust_problem: str = ""
    party: ClusterParty | None = None  # if the job needs signing keys
    observer: Credentials | None = None
    service: ServiceView | None = None
    forbidden_references: tuple[str, ...] = ()  # references in templates that are not allowed


@dataclass
class JobCache:
    """The cached data of one job."""

    uid: str
    dependents: Dependents | None = None
    seen: set[str] = field(default_factory=set)  # Kind/name of objects that have been there
    unmendable: dict[str, tuple[str, ...]] = field(default_factory=dict)  # see Observed
    pods_listed: float = -math.inf  # by time.monotonic()
    refusals: dict[str, Refusal] = field(default_factory=dict)
    refused_times: dict[str, int] = field(default_factory=dict)
    problems: dict[ArrayKey, PoolProblem] = field(default_factory=dict)
    problem_times: dict[ArrayKey, int] = field(default_factory=dict)
    delivered: dict[str, str] = field(default_factory=dict)  # version of the certificate that the site has, by key
    log_answered: str = ""  # the last request that was answered
    other: str = ""  # another operator that serves the job
    events: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)  # events by reason and message
    status_written: float = -math.inf  # likewise
    node_addresses: dict[str, str] = field(default_factory=dict)

    def record_refusal(self, key: str, message: str, now: dt.datetime, by_operator: bool = False) -> None:
        """Record that an object could not be created, and schedule a retry."""
        times = self.refused_times[key] = self.refused_times.get(key, 0) + 1
        self.refusals[key] = Refusal(message, now + _delay(times), by_operator)

    def clear_refusal(self, key: str) -> None:
        """Forget the refusal of an object."""
        self.refusals.pop(key, None)
        self.refused_times.pop(key, None)

    def record_problem(
        self,
        array: ArrayKey,
        kind: ProblemKind,
        message: str,
        now: dt.datetime,
        reason: Reason = Reason.SITE_UNREACHABLE,
    ) -> None:
        """Record a failed call for an array, and schedule a retry."""
        times = self.problem_times[array] = self.problem_times.get(array, 0) + 1
        delay = _delay(times) if kind is ProblemKind.UNREACHABLE else dt.timedelta(seconds=LONGEST_RETRY)
        self.problems[array] = PoolProblem(kind, message, now + delay, reason)

    def clear_problem(self, array: ArrayKey) -> None:
        """Forget the failed calls for an array."""
        self.problems.pop(array, None)
        self.problem_times.pop(array, None)


def _delay(times: int) -> dt.timedelta:
    return dt.timedelta(seconds=backoff.delay(times, _FIRST_RETRY, LONGEST_RETRY))
