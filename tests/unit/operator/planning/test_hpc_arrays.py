"""Tests of HPC pools that grow, shrink or reach their time limit without disturbing the clients that stay."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.acceptance import Acceptance, examine
from isthmus_operator.planning.hpc_arrays import holder
from isthmus_operator.state.job_record import ArrayKey, Record
from isthmus_operator.state.observed import Observed, PoolPhase
from tests.support.fake_cluster import World, job, spec


def wanted(replicas: int = 2, most: int = 6, **changes: Any) -> dict[str, Any]:
    manifest = spec(hpc=replicas, selection={"minClients": 1}, **changes)
    manifest["pools"][1]["hpc"]["maxReplicas"] = most
    return manifest


@pytest.fixture
def world() -> World:
    """A pool of two running clients."""
    one = World(wanted())
    one.trains = False
    go_on(one)
    assert one.living() == [(0, 0, 2)]
    return one


def go_on(world: World, steps: int = 8, seconds: float = 5.0) -> list[act.Action]:
    """Run some passes, and return their actions."""
    done: list[act.Action] = []
    for _ in range(steps):
        done += world.step().actions
        world.tick(seconds)
    return done


def test_it_grows_by_an_array_of_its_own_and_shrinks_from_the_end(world: World) -> None:
    world.resize(4)
    done = go_on(world)
    assert not [item for item in done if isinstance(item, act.CancelPool | act.ShrinkPool)]
    assert world.living() == [(0, 0, 2), (1, 2, 2)]
    grown = next(item.spec for item in done if isinstance(item, act.EnsurePool))
    assert (grown.replicas, grown.first_index, grown.pool_size) == (2, 2, 6)
    assert (grown.first_client, grown.total_clients) == (4, 8)
    world.resize(3)
    go_on(world)
    assert world.living() == [(0, 0, 2), (1, 2, 1)]
    world.resize(1)
    go_on(world)
    assert world.living() == [(0, 0, 1)]
    assert [replicas for _, replicas in world.shrunk] == [1, 1]
    # A client that comes back has a higher attempt than all earlier ones of its index.
    world.resize(3)
    go_on(world)
    assert world.living() == [(0, 0, 1), (2, 1, 2)]
    shown = next(pool for pool in world.job.status["pools"] if pool["name"] == "lumi")
    assert (shown["desired"], shown["ready"], len(shown["jobs"])) == (3, 3, 2)
    record = Record.load(world.job.record)
    found = [holder(record, "lumi", index) for index in range(4)]
    assert [entry.attempt if entry else None for entry in found] == [0, 2, 2, None]


def test_only_the_failed_part_is_restarted(world: World) -> None:
    world.resize(3)
    go_on(world)
    grown = next(key for key, asked in world.requests.items() if asked.first_index == 2)
    world.pools[grown] = replace(world.pools[grown], phase=PoolPhase.FAILED, running=0, failed=1)
    go_on(world, steps=10)
    assert world.living() == [(0, 0, 2), (2, 2, 1)]


def test_after_a_suspension_it_is_one_array_again(world: World) -> None:
    world.resize(4)
    go_on(world)
    world.job = replace(world.job, spec={**world.job.spec, "suspend": True})
    go_on(world)
    assert not world.living()
    world.resize(5)
    world.job = replace(world.job, spec={**world.job.spec, "suspend": False})
    go_on(world)
    assert world.living() == [(2, 0, 5)]


def end_soon(world: World, seconds: float) -> None:
    for key, view in world.pools.items():
        if view.phase is PoolPhase.RUNNING:
            world.pools[key] = replace(view, ends_at=world.now.timestamp() + seconds)


def test_the_next_attempt_queues_before_the_time_limit_ends_the_present_one(world: World) -> None:
    end_soon(world, 1000)
    assert not go_on(world, steps=2)
    end_soon(world, 100)
    done = go_on(world)
    assert not [item for item in done if isinstance(item, act.CancelPool | act.ShrinkPool)]
    assert world.living() == [(0, 0, 2), (1, 0, 2)]
    old = next(key for key, asked in world.requests.items() if asked.attempt == 0)
    world.pools[old] = replace(world.pools[old], phase=PoolPhase.FAILED, running=0, failed=2, timed_out=True)
    go_on(world)
    # Its end is not a failure and has no further effect.
    assert world.living() == [(1, 0, 2)]
    assert list(Record.load(world.job.record).hpc) == [ArrayKey("lumi", 1)]
    assert not [event for event in world.events if event.reason == "ClientFailed"]


def test_it_queues_the_earlier_the_longer_the_queue_was(world: World) -> None:
    (key,) = world.pools
    # It was queued for an hour: the next is requested about 1.5 hours before the end, but not before half-time.
    hour, limit = 3600.0, 10 * 3600
    manifest = wanted()
    manifest["pools"][1]["hpc"]["timeLimitSeconds"] = limit
    world.job = replace(world.job, spec=manifest)
    world.observed = replace(world.observed, accepted=parse_spec(manifest))
    for left, living in ((6000.0, 1), (5000.0, 2)):
        ends_at = world.now.timestamp() + left
        world.pools[key] = replace(world.pools[key], ends_at=ends_at, submitted_at=ends_at - limit - hour)
        go_on(world, steps=3)
        assert len(world.living()) == living


def test_a_pool_that_shrinks_while_two_attempts_overlap_shrinks_both(world: World) -> None:
    end_soon(world, 100)
    go_on(world)
    world.resize(1)
    go_on(world)
    assert world.living() == [(0, 0, 1), (1, 0, 1)]
    world.job = replace(world.job, spec={**world.job.spec, "suspend": True})
    go_on(world)
    assert not world.living()


@settings(max_examples=60)
@given(sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4), st.booleans()), min_size=1, max_size=6))
def test_for_any_sizes_each_client_runs_once_and_remaining_ones_stay(
    sizes: list[tuple[int, int, bool]],
) -> None:
    world = World(wanted())
    world.trains = False
    go_on(world)
    for size, steps, ends in sizes:
        if ends:
            end_soon(world, 1.0)
        staying = {index for _, first, count in world.living() for index in range(first, first + count)}
        world.resize(size)
        for _ in range(steps):
            go_on(world, steps=1)
            running = {index for _, first, count in world.living() for index in range(first, first + count)}
            assert {index for index in staying if index < size} <= running
    for key, view in world.pools.items():
        # Arrays that have a successor reach their time limit.
        if not view.ended and view.ends_at:
            world.pools[key] = replace(view, phase=PoolPhase.FAILED, running=0, queued=0, timed_out=True)
    go_on(world, steps=12)
    clients = [index for _, first, count in world.living() for index in range(first, first + count)]
    assert sorted(clients) == list(range(sizes[-1][0]))
    attempts = [asked.attempt for asked in world.requests.values()]
    assert len(set(attempts)) == len(attempts), "a key was used twice"


@pytest.mark.parametrize(
    ("replicas", "most", "message"),
    [
        (6, 6, ""),
        (1, 6, ""),
        (7, None, "is more than hpc.maxReplicas"),
        (3, None, "spec.pools are ignored: they need a new job (pool lumi was made for at most 2 clients, its hpc.max"),
    ],
)
def test_changes_of_the_size_and_their_messages(replicas: int, most: int | None, message: str) -> None:
    first = wanted()
    if most is None and replicas == 3:
        del first["pools"][1]["hpc"]["maxReplicas"]
    changed = {**first, "pools": [first["pools"][0], {**first["pools"][1], "replicas": replicas}]}
    verdict = examine(job(changed), Observed(accepted=parse_spec(first)))
    assert isinstance(verdict, Acceptance)
    assert message in verdict.message and bool(message) == bool(verdict.message)
    assert verdict.spec.pool("lumi").replicas == (2 if message else replicas)
    # The numbers of the clients stay the same.
    assert verdict.spec.total_clients == parse_spec(first).total_clients


def test_clients_share_jobs_where_the_manifest_says_so() -> None:
    manifest = wanted(5, 5)
    manifest["pools"][1]["hpc"]["clientsPerJob"] = 2
    world = World(manifest)
    go_on(world, steps=4)
    (asked,) = world.requests.values()
    assert (asked.replicas, asked.clients_per_job) == (5, 2)


def only_hpc(replicas: int, **changes: Any) -> dict[str, Any]:
    """A job whose clients are all in one HPC pool of up to four."""
    manifest = spec(cloud=0, hpc=replicas, **changes)
    manifest["pools"][0]["hpc"]["maxReplicas"] = 4
    return manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "it was made for a quorum of 2, and 1 client would train"),
        (
            {"selection": {"minClients": 1}, "stragglers": {"minUpdates": 2}},
            "the changed manifest is invalid",
        ),
    ],
)
def test_a_pool_does_not_shrink_below_what_its_rounds_need(changes: dict[str, Any], message: str) -> None:
    accepted = parse_spec(only_hpc(3, **changes))
    verdict = examine(job(only_hpc(1, **changes)), Observed(accepted=accepted))
    assert isinstance(verdict, Acceptance)
    assert message in verdict.message
    assert verdict.spec.pool("lumi").replicas == 3


def test_the_quorum_is_the_accepted_one() -> None:
    accepted = parse_spec(only_hpc(1))
    verdict = examine(job(only_hpc(4)), Observed(accepted=accepted))
    assert isinstance(verdict, Acceptance)
    assert not verdict.message
    assert verdict.spec.fewest_trainers == 4
    assert verdict.spec.min_clients == accepted.min_clients == 1
