"""Tests of the operator's clock, and of pauses after a clock was set."""

import datetime as dt
from dataclasses import replace
from email.utils import format_datetime

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_operator.effects.bridge import pool_view
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.state.clock import Clock
from isthmus_operator.state.job_cache import JobCache
from isthmus_operator.state.job_record import (
    AggregatorRecord,
    ArrayKey,
    ArrayRecord,
    CloudRecord,
    Record,
    Setback,
)
from isthmus_operator.state.observed import PodView, PoolPhase, PoolProblem, PoolView, ProblemKind, Refusal
from isthmus_operator.state.pod_store import PodStore
from tests.support.fake_cluster import (
    NOW,
    UID,
    aggregator,
    array,
    client,
    job,
    of_kind,
    plan,
    spec,
    standing,
)

from .test_pod_store import pod

LUMI = ArrayKey("lumi")

HOUR = dt.timedelta(hours=1)


class Clocks:
    """The clocks of a node: the monotonic one and the wall clock."""

    def __init__(self, ahead: dt.timedelta = dt.timedelta()) -> None:
        self.passed = 0.0
        self.ahead = ahead
        self.clock = Clock(lambda: 5000.0 + self.passed, lambda: self.wall().timestamp())

    def wall(self) -> dt.datetime:
        return NOW + self.ahead + dt.timedelta(seconds=self.passed)

    def answer(self, took: float = 0.1, moment: dt.datetime | None = None) -> None:
        """Let the API server respond at ``moment`` of its own clock."""
        sent = 5000.0 + self.passed
        self.passed += took
        said = moment or NOW + dt.timedelta(seconds=self.passed - took / 2)
        self.clock.observe_date(format_datetime(said.astimezone(dt.UTC), usegmt=True), sent)

    def off(self) -> float:
        """Return the error of the operator's time in seconds."""
        return (self.clock.now() - NOW).total_seconds() - self.passed


@pytest.mark.parametrize("ahead", [-5 * HOUR, -dt.timedelta(seconds=40), 2 * HOUR])
def test_the_api_servers_time_counts(ahead: dt.timedelta) -> None:
    clocks = Clocks(ahead)
    assert clocks.off() == pytest.approx(ahead.total_seconds())
    clocks.answer()
    assert abs(clocks.off()) < 1
    # A change of the node's clock has no effect.
    clocks.ahead += 3 * HOUR
    clocks.passed += 60
    assert abs(clocks.off()) < 1
    clocks.answer()
    assert abs(clocks.off()) < 1


def test_whole_seconds_and_slow_answers_move_nothing() -> None:
    clocks = Clocks()
    clocks.answer()
    before = clocks.clock.now() - dt.timedelta(seconds=clocks.passed)
    for took in (0.01, 0.7, 3.0, 9.0):
        clocks.answer(took)
        assert abs(clocks.clock.now() - dt.timedelta(seconds=clocks.passed) - before) < dt.timedelta(milliseconds=1)
    # Too slow to be used, and malformed.
    clocks.answer(60.0, NOW + HOUR)
    clocks.clock.observe_date("yesterday", 0.0)
    clocks.clock.observe_date(None, 0.0)
    assert abs(clocks.off()) < 1


def test_an_api_server_whose_clock_is_set_is_followed() -> None:
    clocks = Clocks()
    clocks.answer()
    clocks.answer(moment=NOW - 2 * HOUR)
    assert clocks.off() == pytest.approx(-7200, abs=2)


@pytest.mark.parametrize("node", [-HOUR, dt.timedelta(), HOUR])
def test_a_pause_begins_when_the_operator_sees_a_pod_end(node: dt.timedelta) -> None:
    """A node's clock that is an hour ahead must not delay a client, and one behind must not cause a restart loop."""
    now = NOW
    store = PodStore(lambda: now)

    def ended() -> PodView:
        (known,) = store.of("team", UID)
        return known

    finished = (NOW + node).strftime("%Y-%m-%dT%H:%M:%SZ")
    terminated = {"exitCode": 1, "finishedAt": finished}
    status = {"phase": "Failed", "containerStatuses": [{"name": "client", "state": {"terminated": terminated}}]}
    store.put(pod(version=1, phase="Running"))
    store.put(pod(version=2, **status))
    assert ended().finished == NOW
    now += dt.timedelta(seconds=30)
    store.put(pod(version=3, **status))
    assert ended().finished == NOW
    # Observed for the first time by an operator that has just started: not later than now.
    store = PodStore(lambda: now)
    store.put(pod(version=3, **status))
    assert ended().finished == min(NOW + node, now)


def test_what_failed_is_tried_again_after_the_clock_was_put_back() -> None:
    cache = JobCache(UID)
    cache.record_refusal("Secret/x", "no", NOW)
    cache.record_problem(LUMI, ProblemKind.DENIED, "no", NOW)
    for trouble in (cache.refusals["Secret/x"], cache.problems[LUMI]):
        assert not trouble.due(NOW + dt.timedelta(seconds=1))
        assert trouble.due(NOW + dt.timedelta(seconds=61))
        assert trouble.due(NOW - HOUR)


def test_a_plan_does_not_wait_for_a_pause_noted_before_the_clock_was_put_back() -> None:
    wanted = spec(hpc=2)
    entry = ArrayRecord("site", attempt=1, failures=1, size=2, setback=Setback("", int(NOW.timestamp()) + 40))
    record = Record({"cloud": CloudRecord(2)}, {LUMI: entry}, AggregatorRecord("uid-aggregator"))
    seen = standing(wanted, pods=(aggregator(), client(0), client(1)))

    def asked(now: dt.datetime) -> bool:
        return bool(of_kind(plan(job(wanted, record=record.dump(UID)), seen, now, PlanOptions()), act.EnsurePool))

    assert not asked(NOW)
    assert asked(NOW + dt.timedelta(seconds=41))
    assert asked(NOW - 2 * HOUR)
    refused = replace(seen, present=frozenset({"ConfigMap/demo-job"}), service=None, pods=())
    refused = replace(refused, refusals={"Service/demo-aggregator": Refusal("no", NOW + dt.timedelta(seconds=40))})
    made = [of_kind(plan(job(wanted), refused, now, PlanOptions()), act.Apply) for now in (NOW, NOW - 2 * HOUR)]
    assert [any(item.kind == "Service" for item in items) for items in made] == [False, True]
    denied = PoolProblem(ProblemKind.DENIED, "rule", NOW + dt.timedelta(seconds=40))
    assert denied.due(NOW - 2 * HOUR)


def test_a_pod_that_seems_to_end_in_hours_is_replaced_at_once() -> None:
    wanted = spec()
    failed = {"phase": "Failed", "exit_code": 1, "finished": NOW}
    seen = standing(wanted, pods=(aggregator(**failed), client(0, **failed), client(1)))
    record = Record({"cloud": CloudRecord(2)}, {}, AggregatorRecord("uid-aggregator"))

    def acts(now: dt.datetime) -> tuple[bool, bool]:
        decided = plan(job(wanted, record=record.dump(UID)), seen, now, PlanOptions())
        return bool(of_kind(decided, act.DeletePod)), bool(of_kind(decided, act.CreatePod))

    assert acts(NOW + dt.timedelta(seconds=1)) == (False, False)
    assert acts(NOW + dt.timedelta(seconds=61)) == (True, True)
    assert acts(NOW - 2 * HOUR) == (True, True)


@pytest.mark.parametrize("ahead", [-2 * HOUR, 2 * HOUR])
def test_a_sites_moments_are_taken_as_ours(ahead: dt.timedelta) -> None:
    """A site's clock must not make a queue time-out come two hours early or late."""
    theirs = (NOW + ahead).timestamp()
    said = pb.Pool(phase=pb.Pool.PENDING, queued=2, submitted_at=theirs - 50, expected_start=theirs + 600, now=theirs)
    view = pool_view(said, 0, ahead=ahead.total_seconds())
    assert (view.submitted_at, view.expected_start, view.ends_at) == (
        NOW.timestamp() - 50, NOW.timestamp() + 600, 0.0,
    )  # fmt: skip
    wanted = spec(hpc=2)
    wanted["pools"][1]["hpc"]["maxQueueSeconds"] = 60
    entry = array(certificate="first of demo-lumi-tls")
    record = Record({"cloud": CloudRecord(2)}, {LUMI: entry}, AggregatorRecord("uid-aggregator")).dump(UID)
    pools: dict[ArrayKey, PoolView] = {LUMI: view}
    assert view.phase is PoolPhase.PENDING
    seen = standing(wanted, pods=(aggregator(), client(0), client(1)), pools=pools)
    assert not of_kind(plan(job(wanted, record=record), seen, NOW, PlanOptions()), act.CancelPool)
    later = NOW + dt.timedelta(seconds=11)
    assert of_kind(plan(job(wanted, record=record), seen, later, PlanOptions()), act.CancelPool)
