"""Tests of HPC pools: submissions, attempts, cancellation."""

import datetime as dt
import math
from dataclasses import replace
from typing import Any, cast

import pytest

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.identities import FINALIZER
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_operator.effects.bridge import Bridges, pool_view
from isthmus_operator.effects.observe import node_address
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.render import hpc as render_hpc
from isthmus_operator.state.clock import Clock
from isthmus_operator.state.job_record import (
    AggregatorRecord,
    ArrayKey,
    ArrayState,
    CloudRecord,
    Record,
    Submission,
)
from isthmus_operator.state.observed import (
    FederationView,
    Observed,
    PoolPhase,
    PoolProblem,
    PoolView,
    ProblemKind,
    ServiceView,
)
from tests.support.fake_cluster import (
    AUTHORITY,
    NOW,
    UID,
    World,
    aggregator,
    array,
    client,
    job,
    of_kind,
    plan,
    site,
    spec,
    standing,
)

LUMI = ArrayKey("lumi")

OPTIONS = PlanOptions(cluster="c", site_give_up=3600)
SPEC = spec(hpc=2)


def record(certificate: str = "first of demo-lumi-tls", requested_at: int = 0, **changes: Any) -> str:
    """The stored record while everything runs."""
    pool = array(**changes)
    pool.submission = Submission(requested_at, AUTHORITY, certificate)
    return Record({"cloud": CloudRecord(2)}, {LUMI: pool}, AggregatorRecord("uid-aggregator")).dump(UID)


def around(view: PoolView | None = None, wanted: dict[str, Any] = SPEC, **changes: Any) -> Observed:
    pods = (aggregator(), client(0), client(1))
    pools = {LUMI: view} if view is not None else {}
    return standing(wanted, pods=pods, pools=pools, **changes)


def pool_status(decided: act.Plan) -> dict[str, Any]:
    return next(dict(item) for item in decided.status["pools"] if item["name"] == "lumi")


def unreachable(seconds: float = 5) -> dict[ArrayKey, PoolProblem]:
    return {LUMI: PoolProblem(ProblemKind.UNREACHABLE, "no route", NOW + dt.timedelta(seconds=seconds))}


def test_a_pool_is_asked_for_once_the_address_is_known() -> None:
    decided = plan(job(SPEC), around(service=ServiceView("")), NOW, OPTIONS)
    assert not of_kind(decided, act.EnsurePool)
    assert pool_status(decided)["reason"] == "waits for the address at which the aggregator can be reached"
    decided = plan(job(SPEC), around(), NOW, OPTIONS)
    (ensure,) = of_kind(decided, act.EnsurePool)
    assert (ensure.site, ensure.secret) == ("site", "demo-lumi-tls")
    assert ensure.spec.federation.endpoint == "10.96.0.7:7443"
    assert (ensure.spec.first_client, ensure.spec.total_clients, ensure.spec.replicas) == (2, 4, 2)
    assert list(ensure.spec.command) == ["python", "t.py"]
    # The record is written first, so that the pool is found after a crash.
    assert isinstance(decided.actions[0], act.SaveJob)
    assert Record.load(decided.actions[0].record or "").hpc[LUMI].site == "site"


@pytest.mark.parametrize(
    ("expose", "endpoint"),
    [
        ({"type": "NodePort"}, "192.0.2.7:31443"),
        ({"type": "LoadBalancer"}, "lb.example:7443"),
        ({"address": "gateway.example:443"}, "gateway.example:443"),
        ({"type": "ClusterIP"}, "[fd00::7]:7443"),
    ],
)
def test_where_hpc_clients_dial(expose: dict[str, Any], endpoint: str) -> None:
    wanted = spec(hpc=2, aggregator={"expose": expose})
    service = ServiceView("fd00::7", 31443, "lb.example")
    observed = around(wanted=wanted, service=service, node_address="192.0.2.7")
    (ensure,) = of_kind(plan(job(wanted), observed, NOW, OPTIONS), act.EnsurePool)
    assert ensure.spec.federation.endpoint == endpoint


@pytest.mark.parametrize(
    ("cluster_ip", "address"),
    [("10.96.0.7", "192.0.2.7"), ("fd00::7", "2001:db8::7"), ("", "192.0.2.7")],
)
def test_a_node_of_two_families_is_dialled_in_the_services_own(cluster_ip: str, address: str) -> None:
    both = [
        {"type": "Hostname", "address": "node-1"},
        {"type": "InternalIP", "address": "10.0.0.7"},
        {"type": "InternalIP", "address": "fd01::7"},
        {"type": "ExternalIP", "address": "192.0.2.7"},
        {"type": "ExternalIP", "address": "2001:db8::7"},
    ]
    assert node_address(both, cluster_ip) == address
    assert node_address(both[:3], cluster_ip) == ("fd01::7" if ":" in cluster_ip else "10.0.0.7")
    # A node without an address of that family still has one.
    assert node_address(both[3:4], "fd00::7") == "192.0.2.7"
    assert node_address(both[:1], cluster_ip) == ""


@pytest.mark.parametrize(("access", "via_bridge"), [("Direct", False), ("ViaBridge", True)])
def test_the_site_says_how_its_nodes_reach_the_aggregator(access: str, via_bridge: bool) -> None:
    sites = {"site": site().model_copy(update={"aggregator_access": access})}
    (ensure,) = of_kind(plan(job(SPEC), around(sites=sites), NOW, OPTIONS), act.EnsurePool)
    assert ensure.spec.federation.via_bridge is via_bridge
    assert ensure.spec.federation.endpoint == "10.96.0.7:7443"


def test_the_same_attempt_has_the_same_key_after_a_restart() -> None:
    first = of_kind(plan(job(SPEC), around(), NOW, OPTIONS), act.EnsurePool)[0]
    absent = around(PoolView(0, PoolPhase.ABSENT))
    again = of_kind(plan(job(SPEC, record=record(state=ArrayState.REQUESTED)), absent, NOW, OPTIONS), act.EnsurePool)[0]
    assert first.key == again.key
    assert first.spec == again.spec


def test_a_time_limit_is_no_failure_and_costs_no_delay() -> None:
    view = PoolView(4, PoolPhase.FAILED, failed=2, failure="task 0 TIMEOUT", timed_out=True)
    decided = plan(job(SPEC, record=record(attempt=4, failures=3)), around(view), NOW, OPTIONS)
    (ensure,) = of_kind(decided, act.EnsurePool)
    assert ensure.spec.attempt == 5
    saved = decided.actions[0]
    assert isinstance(saved, act.SaveJob)
    assert Record.load(saved.record or "").hpc[LUMI].failures == 3


def test_a_waiting_pool_shows_slurms_words() -> None:
    moment = NOW.timestamp()
    view = PoolView(
        0,
        PoolPhase.PENDING,
        job_id="8123",
        queued=2,
        reason="Priority",
        expected_start=moment,
        submitted_at=moment,
    )
    decided = plan(job(SPEC, record=record()), around(view), NOW, OPTIONS)
    status = pool_status(decided)
    assert status["reason"] == "Priority (expected start 2030-01-01T00:00Z)"
    assert (status["queued"], status["jobs"]) == (2, ["8123"])
    assert not of_kind(decided, act.EnsurePool)


SLURMS_NO = "Slurm refused: Invalid account or account/partition combination specified"
LOST = "2 of 2 tasks did not succeed; task 0: Slurm no longer knows it (last seen RUNNING)"


@pytest.mark.parametrize(
    ("phase", "message", "tasks"),
    [
        (pb.Pool.FAILED, SLURMS_NO, []),
        (pb.Pool.FAILED, "policy partitions: 'gpu' is not allowed for isthmus://operator/prod; allowed: main", []),
        (pb.Pool.FAILED, "all tasks were cancelled, but not by the bridge", []),
        (pb.Pool.FAILED, LOST, [pb.Task(index=0, state="LOST", reason="last seen RUNNING")]),
        (pb.Pool.SUBMITTING, "Slurm refused: Required partition not available (inactive or drain)", []),
        (pb.Pool.SUBMITTING, "cannot write the pool's files: No space left on device", []),
        (pb.Pool.UNKNOWN, "Slurm does not answer: squeue failed", []),
    ],
)
def test_the_bridges_words_reach_the_user(phase: pb.Pool.Phase.ValueType, message: str, tasks: list[pb.Task]) -> None:
    ended = phase == pb.Pool.FAILED
    pool = pb.Pool(key="x" * 8, phase=phase, message=message, desired=2, failed=2 * ended, queued=2 * (not ended),
                   tasks=tasks)  # fmt: skip
    decided = plan(job(SPEC, record=record()), around(pool_view(pool, 0)), NOW, OPTIONS)
    assert message in pool_status(decided)["reason"]
    if ended:
        assert any(message in event.message for event in decided.events if event.reason == "ClientFailed")


@pytest.mark.parametrize(
    ("states", "displaced"),
    [
        (["PREEMPTED", "PREEMPTED"], True),
        (["NODE_FAIL"], True),
        (["BOOT_FAIL", "RUNNING", "COMPLETED"], True),
        (["PREEMPTED", "POWER_UP_NODE", "EXPEDITING", "UPDATE_DB"], True),
        (["REVOKED", "COMPLETED"], True),
        (["PREEMPTED", "FAILED"], False),
        (["PREEMPTED", "CANCELLED"], False),
        (["NODE_FAIL", "LOST"], False),
        (["RUNNING"], False),
        ([], False),
    ],
)
def test_what_the_site_took_away_is_no_failure_of_the_clients(states: list[str], displaced: bool) -> None:
    tasks = [pb.Task(index=index, state=state, exit_code=1) for index, state in enumerate(states)]
    pool = pb.Pool(key="x" * 8, phase=pb.Pool.FAILED, message="it ended", desired=2, failed=len(states), tasks=tasks)
    view = pool_view(pool, 4)
    assert view.displaced is displaced
    decided = plan(job(SPEC, record=record(attempt=4, failures=1)), around(view), NOW, OPTIONS)
    saved = decided.actions[0]
    assert isinstance(saved, act.SaveJob)
    after = Record.load(saved.record or "").hpc[LUMI]
    assert (after.attempt, after.failures) == (5, 1 if displaced else 2)
    assert ("Preempted" in {event.reason for event in decided.events}) is displaced
    # It is not submitted again at once: the nodes are gone.
    assert not of_kind(decided, act.EnsurePool)


@pytest.mark.parametrize("phase", [PoolPhase.SUBMITTING, PoolPhase.UNKNOWN])
def test_a_pool_that_never_comes_into_the_queue_ends_in_time(phase: PoolPhase) -> None:
    wanted = spec(hpc=2)
    wanted["pools"][1]["hpc"]["maxQueueSeconds"] = 60
    view = PoolView(0, phase, queued=2, message="Slurm refused: the partition is drained")
    asked = record(requested_at=int(NOW.timestamp()))
    assert not of_kind(plan(job(wanted, record=asked), around(view, wanted), NOW, OPTIONS), act.CancelPool)
    late = plan(job(wanted, record=asked), around(view, wanted), NOW + dt.timedelta(seconds=61), OPTIONS)
    assert of_kind(late, act.CancelPool)
    assert "the partition is drained" in pool_status(late)["reason"]


def test_a_wait_that_does_not_end_by_itself_is_explained_and_bounded() -> None:
    moment = NOW.timestamp()
    view = PoolView(0, PoolPhase.PENDING, queued=2, reason="PartitionTimeLimit", submitted_at=moment)
    status = pool_status(plan(job(SPEC, record=record()), around(view), NOW, OPTIONS))
    assert status["reason"] == "PartitionTimeLimit: its time limit is above the partition's"
    late = plan(job(SPEC, record=record()), around(view), NOW + dt.timedelta(seconds=3601), OPTIONS)
    assert of_kind(late, act.CancelPool)
    ordinary = replace(view, reason="Priority")
    late = plan(job(SPEC, record=record()), around(ordinary), NOW + dt.timedelta(seconds=3601), OPTIONS)
    assert not of_kind(late, act.CancelPool)


def test_a_site_that_is_down_is_shown_and_forgets_nothing() -> None:
    view = PoolView(0, PoolPhase.PENDING, job_id="8123", queued=2)
    before = plan(job(SPEC, record=record()), around(view), NOW, OPTIONS).status
    decided = plan(job(SPEC, record=record(), status=before), around(problems=unreachable()), NOW, OPTIONS)
    status = pool_status(decided)
    assert status["reason"] == "SiteUnreachable: no route"
    assert (status["queued"], status["jobs"]) == (2, ["8123"])
    assert not decided.actions


def test_a_site_that_dials_out_and_is_not_connected_is_shown_as_one_that_is_down() -> None:
    (key,) = unreachable()
    absent = PoolProblem(ProblemKind.UNREACHABLE, "no bridge", NOW, Reason.SITE_NOT_CONNECTED)
    status = pool_status(plan(job(SPEC, record=record()), around(problems={key: absent}), NOW, OPTIONS))
    assert status["reason"] == "SiteUnreachable: no bridge"


def test_a_site_that_takes_nothing_for_now_says_why_and_is_asked_again() -> None:
    words = "policy drain: this site takes no new jobs for now: maintenance on 3 June"
    problem = PoolProblem(ProblemKind.UNREACHABLE, words, NOW, Reason.POLICY_DENIED)
    decided = plan(job(SPEC), around(problems={LUMI: problem}), NOW, OPTIONS)
    assert pool_status(decided)["reason"] == f"PolicyDenied: {words}"
    assert of_kind(decided, act.EnsurePool)


def test_a_denied_pool_names_the_rule_and_the_job_goes_on_if_it_can() -> None:
    problem = PoolProblem(ProblemKind.DENIED, "rule partitions: gpu is not yours", NOW + dt.timedelta(seconds=60))
    decided = plan(job(SPEC, record=record(state=ArrayState.REQUESTED)), around(problems={LUMI: problem}), NOW, OPTIONS)
    assert pool_status(decided)["reason"] == "PolicyDenied: rule partitions: gpu is not yours"
    assert "Failed" not in {item["type"] for item in decided.status["conditions"]}
    later = plan(
        job(SPEC, record=record(state=ArrayState.REQUESTED)),
        around(problems={LUMI: problem}),
        NOW + dt.timedelta(seconds=61),
        OPTIONS,
    )
    assert of_kind(later, act.EnsurePool)


@pytest.mark.parametrize("kind", [ProblemKind.DENIED, ProblemKind.REFUSED])
def test_a_pool_that_runs_is_not_lost_for_a_denied_question(kind: ProblemKind) -> None:
    alone = spec(cloud=0, hpc=2)
    problem = PoolProblem(kind, "rule identities: unknown", NOW + dt.timedelta(seconds=60))
    said = FederationView("TRAINING", current_round=2, completed_rounds=1, connected={"lumi": 2})
    observed = standing(alone, pods=(aggregator(),), federation=said, problems={LUMI: problem})
    decided = plan(job(alone, record=record(state=ArrayState.RAN)), observed, NOW, OPTIONS)
    assert decided.status["phase"] == "Running"
    assert pool_status(decided)["reason"] == "PolicyDenied: rule identities: unknown"
    # An attempt that the site never accepted cannot succeed.
    new = plan(job(alone, record=record(attempt=1, state=ArrayState.REQUESTED)), observed, NOW, OPTIONS)
    assert "Failed" in {item["type"] for item in new.status["conditions"]}


def test_a_denied_pool_that_is_needed_fails_the_job() -> None:
    world = World(spec(hpc=2, selection={"minClients": 3}))
    world.denied = True
    world.run()
    assert world.condition("Failed") == "True/PolicyDenied"
    assert "rule partitions: no" in world.job.status["message"]


def test_a_pool_that_ended_early_is_submitted_again_within_limits() -> None:
    wanted = spec(hpc=2, backoffLimit=1)
    ended = PoolView(0, PoolPhase.FAILED, job_id="17", failed=2, failure="task 1 FAILED (exit code 1)\nValueError: x")
    first = plan(job(wanted, record=record()), around(ended, wanted), NOW, OPTIONS)
    assert not of_kind(first, act.EnsurePool)
    assert "submitted again in 10 s" in next(e.message for e in first.events if e.reason == "ClientFailed")
    saved = of_kind(first, act.SaveJob)[0].record
    entry = Record.load(saved).hpc[LUMI]
    assert (entry.attempt, entry.failures) == (1, 1)
    second = plan(job(wanted, record=saved), around(None, wanted), NOW + dt.timedelta(seconds=11), OPTIONS)
    (ensure,) = of_kind(second, act.EnsurePool)
    assert ensure.spec.attempt == 1
    again = record(attempt=1, failures=1)
    over = plan(job(wanted, record=again), around(replace(ended, attempt=1), wanted), NOW, OPTIONS)
    assert Record.load(of_kind(over, act.SaveJob)[0].record).hpc[LUMI].given_up is Reason.CLIENT_FAILED
    assert "ValueError: x" in pool_status(over)["reason"]


def test_a_renewed_certificate_is_handed_on_to_what_runs() -> None:
    running = PoolView(0, PoolPhase.RUNNING, running=2, submitted_at=NOW.timestamp())
    settled = plan(job(SPEC, record=record(state=ArrayState.RAN)), around(running), NOW, OPTIONS)
    assert not settled.actions
    seen = around(running)
    renewed = replace(seen, certificates={**seen.certificates, "demo-lumi-tls": "second"})
    key = render_hpc.key("c", job(SPEC), "lumi", 0)
    wanted = act.RenewCredentials(LUMI, "site", key, "demo-lumi-tls")
    assert plan(job(SPEC, record=record(state=ArrayState.RAN)), renewed, NOW, OPTIONS).actions == (wanted,)
    # There is no request to an unreachable site, for an ended pool, or while the Secret is being created.
    silent = PoolProblem(ProblemKind.UNREACHABLE, "no route", NOW + dt.timedelta(seconds=5))
    for changed in (
        replace(renewed, problems={LUMI: silent}),
        replace(renewed, pools={LUMI: replace(running, phase=PoolPhase.SUCCEEDED, running=0, succeeded=2)}),
        replace(renewed, certificates={k: v for k, v in seen.certificates.items() if k != "demo-lumi-tls"}),
    ):
        assert not of_kind(
            plan(job(SPEC, record=record(state=ArrayState.RAN)), changed, NOW, OPTIONS), act.RenewCredentials
        )
    # Once the site has it, that is recorded, and nothing is left to do.
    (save,) = plan(
        job(SPEC, record=record(state=ArrayState.RAN)), replace(renewed, delivered={key: "second"}), NOW, OPTIONS
    ).actions
    assert save == act.SaveJob(record(state=ArrayState.RAN, certificate="second"))
    assert not plan(job(SPEC, record=record(state=ArrayState.RAN, certificate="second")), renewed, NOW, OPTIONS).actions


def test_a_pool_that_waits_too_long_is_given_up() -> None:
    wanted = spec(hpc=2)
    wanted["pools"][1]["hpc"]["maxQueueSeconds"] = 60
    view = PoolView(0, PoolPhase.PENDING, queued=2, reason="Resources", submitted_at=NOW.timestamp())
    assert not plan(job(wanted, record=record()), around(view, wanted), NOW, OPTIONS).actions
    late = plan(job(wanted, record=record()), around(view, wanted), NOW + dt.timedelta(seconds=61), OPTIONS)
    assert of_kind(late, act.CancelPool)
    assert pool_status(late)["reason"].startswith("QueueTimeout: waited in the queue for more than 60 s")
    assert "QueueTimeout" in {event.reason for event in late.events}
    # A pool that has run and was requeued is not given up.
    assert not of_kind(
        plan(
            job(wanted, record=record(state=ArrayState.RAN)),
            around(view, wanted),
            NOW + dt.timedelta(seconds=61),
            OPTIONS,
        ),
        act.CancelPool,
    )


def test_the_last_attempts_tasks_that_ended_no_longer_count() -> None:
    wanted = spec(cloud=0, hpc=3, backoffLimit=0, selection={"minClients": 3})
    world = World(wanted)
    world.trains = False
    for _ in range(6):
        world.step()
        world.tick(5)
    (key,) = world.pools
    world.pools[key] = replace(world.pools[key], running=2, failed=1, failure="task 0 FAILED (exit code 1)\nOSError")
    world.run()
    assert world.condition("Failed") == "True/QuorumImpossible"
    assert world.pools[key].phase is PoolPhase.CANCELLED


def test_deletion_waits_for_the_site() -> None:
    going = job(SPEC, record=record(), deleted=NOW)
    decided = plan(going, around(problems=unreachable(-1)), NOW, OPTIONS)
    assert of_kind(decided, act.CancelPool)
    assert not [item for item in of_kind(decided, act.SaveJob) if item.finalizers is not None]
    assert decided.status["message"] == "cancelling pool lumi at site (no route)"
    ended = plan(going, around(PoolView(0, PoolPhase.CANCELLED)), NOW, OPTIONS)
    assert ended.actions[-1] == act.SaveJob(finalizers=())


def test_deletion_gives_up_in_the_end_and_says_so() -> None:
    going = job(SPEC, record=record(), deleted=NOW, finalizers=("other", FINALIZER))
    decided = plan(going, around(problems=unreachable()), NOW + dt.timedelta(hours=1, seconds=1), OPTIONS)
    assert decided.actions[-1] == act.SaveJob(finalizers=("other",))
    assert [event.reason for event in decided.events] == ["SiteUnreachable"]
    assert "lumi at site" in decided.events[0].message


def test_an_unknown_key_is_cancelled_too_so_that_a_late_request_cannot_revive_it() -> None:
    going = job(SPEC, record=record(state=ArrayState.REQUESTED), deleted=NOW)
    decided = plan(going, around(PoolView(0, PoolPhase.ABSENT)), NOW, OPTIONS)
    assert of_kind(decided, act.CancelPool)


def test_a_job_whose_site_never_let_it_in_can_go() -> None:
    problem = PoolProblem(ProblemKind.DENIED, "who are you", NOW)
    going = job(SPEC, record=record(state=ArrayState.REQUESTED), deleted=NOW)
    assert plan(going, around(problems={LUMI: problem}), NOW, OPTIONS).actions[-1] == act.SaveJob(finalizers=())


@pytest.mark.parametrize("accepted", [True, False])
def test_a_pool_that_the_manifest_no_longer_names_is_still_cancelled(accepted: bool) -> None:
    going = job(spec(), record=record(), deleted=NOW)
    observed = around(PoolView(0, PoolPhase.RUNNING, running=2))
    decided = plan(going, observed if accepted else replace(observed, accepted=None), NOW, OPTIONS)
    assert [item.site for item in of_kind(decided, act.CancelPool)] == ["site"]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e20, 1e300, -5.0, 1e11])
def test_an_invalid_time_from_a_site_stops_no_job(odd: float) -> None:
    for phase in (pb.Pool.RUNNING, pb.Pool.PENDING):
        said = pb.Pool(
            phase=phase, queued=2, reason="Priority", expected_start=odd, submitted_at=odd, ends_at=odd, now=odd
        )
        for view in (pool_view(said, 0), Bridges(cast(Any, None), Clock())._view(said, 0)):
            assert (view.expected_start, view.submitted_at, view.ends_at) == (0.0, 0.0, 0.0)
            decided = plan(job(SPEC, record=record()), around(view), NOW, OPTIONS)
            assert decided.status["phase"] == "Starting"


@pytest.mark.parametrize("known", [True, False])
def test_the_message_says_who_cancels_an_abandoned_pool(known: bool) -> None:
    going = job(SPEC, record=record(), deleted=NOW - dt.timedelta(hours=2))
    observed = around(PoolView(0, PoolPhase.RUNNING, running=2))
    (event,) = plan(going, observed if known else replace(observed, sites={}), NOW, OPTIONS).events
    assert ("it is cancelled once the site answers" in event.message) is known
    key = render_hpc.key("c", going, "lumi", 0)
    told = f"HPCSite site no longer exists: cancel the Slurm jobs named isthmus-{key} at the site by hand"
    assert (told in event.message) is not known
