"""Decisions of a round, as pure functions of its state."""

import math
from asyncio import Future
from collections import Counter
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from ..clients.client_history import Report
from ..clients.membership import ClientId

# If enough other updates are there, the round goes on without a client whose connection has been broken for this long
# (or whose successor has not started by then). Seconds.
LOST_CLIENT_GRACE = 30.0

UpdateKey = tuple[ClientId, int]
"""Client and round of an update."""


@dataclass
class RoundState:
    """Selection and updates of a round. Times are monotonic seconds."""

    number: int
    started: float
    deadline: float
    selected: set[ClientId] = field(default_factory=set)
    accepted: set[ClientId] = field(default_factory=set)
    rejected: set[ClientId] = field(default_factory=set)
    """Clients whose update was invalid. They may try again in the next round, or when the deadline is extended."""
    able: Set[ClientId] | None = None
    """Clients whose update can count, with secure aggregation; ``None``: all selected ones."""
    target: int | None = None
    """Number of updates that ends the round early; ``None`` waits for all selected clients."""
    late: set[UpdateKey] = field(default_factory=set)
    """Updates of earlier rounds that count in this one."""
    reports: list[tuple[ClientId, Report]] = field(default_factory=list)
    """One entry for each update that counts."""
    folding: dict[UpdateKey, Future[Any]] = field(default_factory=dict)
    """Counted updates that are being added to the result ("folded"). This may still fail for lack of disk space."""
    fault: str = ""
    """Client and reason of the newest refusal."""
    diverged: Counter[ClientId] = field(default_factory=Counter)
    """By client, the number of attempts at this round that ended in NaN, infinity or huge numbers."""

    @property
    def updates(self) -> int:
        """Number of updates that count."""
        return len(self.accepted) + len(self.late)


def blocking_client(state: RoundState, chances: int, trainers: int, min_updates: int) -> ClientId | None:
    """Return a client that has diverged more than ``chances`` times and without which no round can end, or ``None``.

    A client does not block the job if the other clients, of ``trainers`` in all, could submit ``min_updates`` updates
    once they are connected.
    """
    diverged = [client for client, times in state.diverged.items() if times > chances and client not in state.accepted]
    return diverged[0] if diverged and trainers - len(diverged) < min_updates else None


class Presence(Protocol):
    """The part of a client's state that decisions depend on."""

    @property
    def ready(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    @property
    def lost_at(self) -> float: ...


class Verdict(Enum):
    """Next step of a round."""

    COMMIT = auto()
    WAIT = auto()
    SELECT_MORE = auto()  # too few of the selected clients can still submit: select others, if there are any
    EXTEND = auto()  # the deadline passed without enough updates: extend it


@dataclass(frozen=True)
class Decision:
    """A verdict, and the latest time of the next decision (monotonic seconds)."""

    verdict: Verdict
    recheck_at: float


def decide(state: RoundState, presence: Mapping[ClientId, Presence], min_updates: int, now: float) -> Decision:
    """Return the next step of the round, given the presence of its clients.

    A round is committed only when no update is being folded: an update that cannot be kept because the disk is full
    does not count, and its client sends it again.
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
    """Return the selected clients that may still submit, and when the passing of time may change that."""
    outstanding, recheck_at = [], state.deadline
    able = state.selected if state.able is None else state.able
    for client in able - state.accepted - state.rejected:
        seen = presence.get(client)
        if seen is None or seen.failed:
            continue
        if seen.ready:
            outstanding.append(client)
        elif now < seen.lost_at + LOST_CLIENT_GRACE:
            outstanding.append(client)
            recheck_at = min(recheck_at, seen.lost_at + LOST_CLIENT_GRACE)
    return outstanding, recheck_at
