"""Decisions of a round."""

import asyncio
from dataclasses import dataclass

import pytest

from isthmus.aggregator.clients.membership import ClientId
from isthmus.aggregator.state.round_decision import LOST_CLIENT_GRACE, RoundState, Verdict, blocking_client, decide

A, B, C, D = [("p", index) for index in range(4)]


@dataclass(frozen=True)
class Presence:
    ready: bool
    failed: bool
    lost_at: float


READY = Presence(ready=True, failed=False, lost_at=0.0)
FAILED = Presence(ready=False, failed=True, lost_at=0.0)
NOW = 1000.0
DEADLINE = NOW + 100


def lost(seconds_ago: float) -> Presence:
    return Presence(ready=False, failed=False, lost_at=NOW - seconds_ago)


def state(accepted: set[ClientId], selected: set[ClientId], rejected: set[ClientId] | None = None) -> RoundState:
    return RoundState(1, NOW - 10, DEADLINE, set(selected), set(accepted), set(rejected or ()))


@pytest.mark.parametrize(
    ("accepted", "presence", "min_updates", "now", "verdict"),
    [
        # all clients are training or have submitted
        (set(), {A: READY, B: READY}, 2, NOW, Verdict.WAIT),
        ({A}, {A: READY, B: READY}, 1, NOW, Verdict.WAIT),
        ({A, B}, {A: READY, B: READY}, 2, NOW, Verdict.COMMIT),
        # one failed for good: the round goes on if the quorum holds, otherwise it needs more clients
        ({A}, {A: READY, B: FAILED}, 1, NOW, Verdict.COMMIT),
        ({A}, {A: READY, B: FAILED}, 2, NOW, Verdict.SELECT_MORE),
        # one is disconnected, and may reconnect within the grace period
        ({A}, {A: READY, B: lost(1)}, 1, NOW, Verdict.WAIT),
        ({A}, {A: READY, B: lost(LOST_CLIENT_GRACE)}, 1, NOW, Verdict.COMMIT),
        ({A}, {A: READY, B: lost(LOST_CLIENT_GRACE)}, 2, NOW, Verdict.SELECT_MORE),
        # a client may disconnect after it has submitted
        ({A, B}, {A: lost(50), B: lost(50)}, 2, NOW, Verdict.COMMIT),
        # the deadline
        ({A}, {A: READY, B: READY}, 1, DEADLINE, Verdict.COMMIT),
        ({A}, {A: READY, B: READY}, 2, DEADLINE, Verdict.EXTEND),
    ],
)
def test_verdicts(
    accepted: set[ClientId], presence: dict[ClientId, Presence], min_updates: int, now: float, verdict: Verdict
) -> None:
    assert decide(state(accepted, set(presence)), presence, min_updates, now).verdict is verdict


def test_a_refused_update_is_not_waited_for() -> None:
    decision = decide(state({A}, {A, B}, rejected={B}), {A: READY, B: READY}, 1, NOW)
    assert decision.verdict is Verdict.COMMIT


def test_the_next_decision_is_due_when_the_grace_of_a_lost_client_ends() -> None:
    decision = decide(state({A}, {A, B}), {A: READY, B: lost(10)}, 1, NOW)
    assert decision.recheck_at == NOW - 10 + LOST_CLIENT_GRACE


def test_a_round_with_a_target_does_not_wait_for_the_rest() -> None:
    everybody = {A: READY, B: READY, C: READY, D: READY}
    over_selected = state({A, B}, set(everybody))
    over_selected.target = 3
    assert decide(over_selected, everybody, 2, NOW).verdict is Verdict.WAIT
    # An update of an earlier round counts as well.
    over_selected.late.add((C, 7))
    assert decide(over_selected, everybody, 2, NOW).verdict is Verdict.COMMIT
    # A target below the minimum does not lower the minimum.
    assert decide(over_selected, everybody, 4, NOW).verdict is Verdict.WAIT


@pytest.mark.parametrize("now", [NOW, DEADLINE])
def test_a_round_ends_once_all_counted_updates_are_folded(now: float) -> None:
    presence, round_state = {A: READY, B: READY}, state({A, B}, {A, B})
    round_state.folding[A, 1] = asyncio.Future(loop=asyncio.new_event_loop())
    assert decide(round_state, presence, 1, now).verdict is Verdict.WAIT
    round_state.folding.clear()
    assert decide(round_state, presence, 1, now).verdict is Verdict.COMMIT


def test_a_diverging_client_does_not_end_a_job_that_others_can_continue() -> None:
    trying = state(set(), {A, B, C, D})
    trying.diverged[A] = 100
    assert blocking_client(trying, 3, trainers=4, min_updates=3) is None
    assert blocking_client(trying, 3, trainers=4, min_updates=4) == A
    trying.diverged.update({B: 3, C: 4})
    assert blocking_client(trying, 3, trainers=4, min_updates=3) == A
    assert blocking_client(trying, 3, trainers=4, min_updates=2) is None
