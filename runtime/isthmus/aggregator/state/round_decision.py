"""The decisions of a round, apart from everything that carries them out."""

import math
from asyncio import Future
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from ..clients.client_history import Report
from ..clients.membership import ClientId

# How long a client whose connection broke in the middle of a round may take to come back (or its successor to start)
# before the round goes on without it, where enough others have handed in. Seconds.
LOST_CLIENT_GRACE = 30.0


@dataclass
class RoundState:
    """What has happened in the current round. Times are monotonic seconds."""

    number: int
    started: float
    deadline: float
    selected: set[ClientId] = field(default_factory=set)
    accepted: set[ClientId] = field(default_factory=set)
    rejected: set[ClientId] = field(default_factory=set)
    """Clients whose update was invalid: they get another chance in the next round, or when this one starts over."""
    target: int | None = None
    """With so many updates it ends, whoever is still at work; ``None``: it waits for everybody."""
    late: set[tuple[ClientId, int]] = field(default_factory=set)
    """Updates of earlier rounds (their client and that round) that count in this one."""
    reports: list[tuple[ClientId, Report]] = field(default_factory=list)
    """Of every update that counts."""
    folding: dict[tuple[ClientId, int], Future[Any]] = field(default_factory=dict)
    """Updates (their client and round) among those that count that are on their way into the result, and may yet fail
    to be kept."""
    fault: str = ""
    """Who was refused last, and why."""
    diverged: Counter[ClientId] = field(default_factory=Counter)
    """In how many of the round's runs at it each client's update was refused, since it held NaN, infinity or huge
    numbers."""

    @property
    def updates(self) -> int:
        """How many count."""
        return len(self.accepted) + len(self.late)


def blocking_client(state: RoundState, chances: int, trainers: int, min_updates: int) -> ClientId | None:
    """Return a client that has diverged in more than ``chances`` runs at the round, where no round can do without it.

    ``None`` while the others of the job's ``trainers``, once they are all there, could hand in enough: no client ends a
    job that others can go on with.
    """
    diverged = [client for client, times in state.diverged.items() if times > chances and client not in state.accepted]
    return diverged[0] if diverged and trainers - len(diverged) < min_updates else None


class Presence(Protocol):
    """What a round needs to know of one client."""

    @property
    def ready(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    @property
    def lost_at(self) -> float: ...


class Verdict(Enum):
    """What to do with a round."""

    COMMIT = auto()
    WAIT = auto()
    SELECT_MORE = auto()  # too few of the selected can still hand in: take others in, where there are any
    EXTEND = auto()  # the deadline passed without enough updates: start the clock again


@dataclass(frozen=True)
class Decision:
    """A verdict, and when to look again at the latest (monotonic seconds)."""

    verdict: Verdict
    recheck_at: float


def decide(state: RoundState, presence: Mapping[ClientId, Presence], min_updates: int, now: float) -> Decision:
    """Return what to do with the round, given who is there.

    A round that could end does so once nothing is being folded: an update that cannot be kept, since the disk is full,
    does not count, and its client tries again.
    """
    decision = _decide(state, presence, min_updates, now)
    if decision.verdict is Verdict.COMMIT and state.folding:
        return Decision(Verdict.WAIT, math.inf)
    return decision


def _decide(state: RoundState, presence: Mapping[ClientId, Presence], min_updates: int, now: float) -> Decision:
    outstanding, recheck_at = _outstanding(state, presence, now)
    enough = state.updates >= min_updates
    full = state.target is not None and state.updates >= state.target
    if enough and (full or not outstanding):
        return Decision(Verdict.COMMIT, now)
    if now >= state.deadline:
        return Decision(Verdict.COMMIT if enough else Verdict.EXTEND, now)
    if state.updates + len(outstanding) < min_updates:
        return Decision(Verdict.SELECT_MORE, recheck_at)
    return Decision(Verdict.WAIT, recheck_at)


def _outstanding(
    state: RoundState, presence: Mapping[ClientId, Presence], now: float
) -> tuple[Collection[ClientId], float]:
    """The selected clients that may still hand in, and when that may change by time alone."""
    outstanding, recheck_at = [], state.deadline
    for client in state.selected - state.accepted - state.rejected:
        seen = presence.get(client)
        if seen is None or seen.failed:
            continue
        if seen.ready:
            outstanding.append(client)
        elif now < seen.lost_at + LOST_CLIENT_GRACE:
            outstanding.append(client)
            recheck_at = min(recheck_at, seen.lost_at + LOST_CLIENT_GRACE)
    return outstanding, recheck_at
