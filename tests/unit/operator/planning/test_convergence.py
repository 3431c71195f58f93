"""Property tests: from any state and with any disturbance, the plan converges."""

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus_contracts.identities import FINALIZER
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.planning.status import merge_patch
from isthmus_operator.state.job_record import (
    AggregatorRecord,
    ArrayKey,
    ArrayRecord,
    ArrayState,
    ClientRecord,
    CloudRecord,
    Record,
    Submission,
)
from isthmus_operator.state.observed import Observed, PodView, PoolPhase, PoolView, ServiceView
from tests.support.fake_cluster import AUTHORITY, NOW, UID, World, aggregator, certificates, client, present, site, spec

LUMI = ArrayKey("lumi")

PHASES = ("Pending", "Running", "Succeeded", "Failed")


def bursting(burst: bool, **changes: Any) -> dict[str, Any]:
    wanted = spec(**changes)
    if burst and wanted["pools"][0]["name"] == "cloud":
        wanted["pools"][0]["cloud"] = {"minReplicas": 1, "maxReplicas": wanted["pools"][0]["replicas"] + 2}
    for pool in wanted["pools"]:
        if "hpc" in pool:
            pool["hpc"]["maxReplicas"] = 4
    return wanted


specs = st.builds(
    bursting,
    st.booleans(),
    cloud=st.integers(0, 4),
    hpc=st.integers(1, 3),
    backoffLimit=st.integers(0, 2),
    rounds=st.integers(1, 6),
    suspend=st.booleans(),
)


@st.composite
def pods(draw: st.DrawFn) -> tuple[PodView, ...]:
    found = {}
    for _ in range(draw(st.integers(0, 6))):
        phase = draw(st.sampled_from(PHASES))
        pod = client(
            draw(st.integers(0, 5)), draw(st.integers(0, 3)), phase,
            deleting=draw(st.booleans()), disrupted=draw(st.booleans()),
            exit_code=draw(st.sampled_from([None, 0, 1, 137])),
            finished=NOW if phase in ("Succeeded", "Failed") else None,
        )  # fmt: skip
        found[pod.name] = replace(pod, authority=draw(st.sampled_from([AUTHORITY, "b" * 16, ""])))
    if draw(st.booleans()):
        pod = aggregator(draw(st.sampled_from(PHASES)), deleting=draw(st.booleans()), restarts=draw(st.integers(0, 3)))
        found[pod.name] = replace(pod, authority=draw(st.sampled_from([AUTHORITY, "b" * 16])))
    return tuple(found.values())


records = st.one_of(
    st.just(""),
    st.just("not a record"),
    st.builds(
        lambda cloud, hpc, crashes: Record(cloud, hpc, AggregatorRecord("uid-aggregator", 0, crashes, 0)).dump(UID),
        st.dictionaries(
            st.just("cloud"),
            st.builds(
                CloudRecord,
                st.integers(0, 4),
                st.dictionaries(
                    st.integers(0, 4),
                    st.builds(ClientRecord, st.integers(0, 4), st.integers(0, 3), st.integers(-1, 4)),
                ),
            ),
        ),
        st.dictionaries(
            st.just(LUMI),
            st.builds(
                ArrayRecord,
                st.just("site"),
                attempt=st.integers(0, 3),
                failures=st.integers(0, 3),
                state=st.sampled_from(ArrayState),
                submission=st.builds(Submission, authority=st.sampled_from([AUTHORITY, "c" * 16])),
            ),
        ),
        st.integers(0, 3),
    ),
)


@st.composite
def observations(draw: st.DrawFn, wanted: dict[str, Any]) -> Observed:
    parsed = parse_spec(wanted)
    accepted = draw(st.booleans())
    things = draw(st.sets(st.sampled_from(sorted(present(parsed)))))
    things = (things | {"ConfigMap/demo-job"}) if accepted else things - {"ConfigMap/demo-job"}
    authority = draw(st.sampled_from(["", AUTHORITY]))
    good = draw(st.sets(st.sampled_from(sorted(certificates(parsed).items())))) if authority else set()
    return Observed(
        pods=draw(pods()),
        accepted=parsed if accepted else None,
        present=frozenset(things),
        authority=authority,
        authority_ends=bool(authority) and draw(st.booleans()),
        certificates=dict(good),
        service=ServiceView("10.96.0.7") if "Service/demo-aggregator" in things else None,
        sites={"site": site()},
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    wanted = draw(specs)
    world = World(wanted, draw(observations(wanted)), record=draw(records))
    world.rounds = draw(st.integers(0, wanted["rounds"]))
    if draw(st.booleans()):
        world.job = replace(world.job, finalizers=(FINALIZER,), deleted=NOW)
    elif draw(st.booleans()):
        world.job = replace(world.job, finalizers=(FINALIZER,))
    for attempt in range(draw(st.integers(0, 3))):
        phase = draw(st.sampled_from([PoolPhase.PENDING, PoolPhase.RUNNING, PoolPhase.FAILED, PoolPhase.CANCELLED]))
        tasks: dict[str, Any] = {PoolPhase.PENDING: {"queued": 2}, PoolPhase.RUNNING: {"running": 2}}.get(phase, {})
        view = PoolView(0, phase, job_id="9", submitted_at=NOW.timestamp(), **tasks)
        world.pools[world._key("lumi", attempt)] = view
    # The record is written ahead: what it never requested does not exist, and what it saw end stays ended.
    entry = world._record().hpc.get(LUMI)
    for attempt in range(entry.attempt + 1 if entry is not None else 1, 3):
        world.pools.pop(world._key("lumi", attempt), None)  # an attempt is recorded before it is requested
    if entry is not None:
        current = world._key("lumi", entry.attempt)
        if entry.ended and current in world.pools:
            world.pools[current] = replace(world.pools[current], phase=PoolPhase.CANCELLED, queued=0, running=0)
        elif not entry.at_site:
            world.pools.pop(current, None)
    return world


KINDS = (
    "fail", "vanish", "secret", "authority", "service", "site", "restart", "task", "suspend", "quota", "replicas",
    "ends", "time passes", "clock", "none",
)  # fmt: skip


def disturb(world: World, data: st.DataObject) -> None:
    """Cause one disturbance."""
    names = [pod.name for pod in world.observed.pods]
    match data.draw(st.sampled_from(KINDS)):
        case "fail" if names:
            world.fail(data.draw(st.sampled_from(names)), disrupted=data.draw(st.booleans()))
        case "vanish" if names:
            world.vanish(data.draw(st.sampled_from(names)))
        case "secret":
            world.observed = replace(world.observed, certificates={})
        case "authority":
            world.observed = replace(world.observed, authority="", certificates={})
        case "time passes":
            world.observed = replace(world.observed, authority_ends=bool(world.observed.authority))
        case "clock":
            world.now += dt.timedelta(hours=data.draw(st.sampled_from([-5.0, 5.0])))
        case "suspend":
            flipped = {**world.job.spec, "suspend": not world.job.spec.get("suspend")}
            world.job = replace(world.job, spec=flipped, generation=world.job.generation + 1)
        case "replicas":
            world.resize(data.draw(st.integers(1, 4)))
        case "ends":
            # The time limit of every array is near.
            soon = world.now.timestamp() + data.draw(st.sampled_from([1.0, 100.0]))
            for key, view in world.pools.items():
                if view.phase is PoolPhase.RUNNING:
                    world.pools[key] = replace(view, ends_at=soon)
        case "quota":
            world.quota = 2 if world.quota is None else None
        case "service":
            kept = world.observed.present - {"Service/demo-aggregator"}
            world.observed = replace(world.observed, present=kept, service=None)
        case "site":
            world.site_up = not world.site_up
        case "restart":
            world.observed = replace(world.observed, refusals={}, problems={})
        case "task":
            for key, view in world.pools.items():
                if view.phase is PoolPhase.RUNNING:
                    world.pools[key] = replace(view, phase=PoolPhase.FAILED, failed=view.running, running=0)
        case _:
            pass


def check_settled(world: World) -> None:
    """Check that nothing is left to do and that nothing runs that should not."""
    if world.gone:
        return
    before = world.job.status
    decided = world.step()
    assert not decided.actions
    assert not merge_patch(before, decided.status)
    assert not decided.events
    ends = {world.condition(type_).split("/")[0] for type_ in ("Complete", "Failed", "Suspended")}
    assert "True" in ends, f"stuck: {world.job} {world.look()}"
    assert not [pod for pod in world.observed.pods if not pod.ended]
    left = [key for key, view in world.pools.items() if not view.ended]
    assert not [key for key in left if _known(world, key)]


def _known(world: World, key: str) -> bool:
    """Return True if the operator can know of a pool: only attempts in its record."""
    return any(key == world._key(array.pool, entry.attempt) for array, entry in world._record().hpc.items())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_state_converges(data: st.DataObject) -> None:
    world = data.draw(worlds())
    for _ in range(data.draw(st.integers(0, 12))):
        world.step()
        if world.gone:
            return
        disturb(world, data)
        world.tick(data.draw(st.sampled_from([0.1, 3.0, 30.0])))
    world.site_up, world.quota = True, None
    world.run()
    check_settled(world)


@pytest.mark.parametrize("cloud", [2, 7])
@pytest.mark.parametrize("hpc", [0, 3])
def test_the_ordinary_course(cloud: int, hpc: int) -> None:
    world = World(spec(cloud=cloud, hpc=hpc))
    world.run()
    assert world.condition("Complete") == "True/RoundsCompleted"
    reasons = [event.reason for event in world.events]
    assert reasons == ["Valid", "AggregatorRunning", "EnoughClients", "RoundsCompleted"]
    # No client was started twice.
    assert {pod.attempt for pod in world.observed.pods} == {0}
    assert len(world.pools) == (1 if hpc else 0)
    check_settled(world)


@settings(max_examples=100)
@given(data=st.data(), at=st.integers(0, 15))
def test_a_job_can_be_deleted_at_any_moment(data: st.DataObject, at: int) -> None:
    world = World(spec(cloud=2, hpc=2))
    for _ in range(at):
        world.step()
        disturb(world, data)
        world.tick(5)
    world.site_up, world.quota = True, None
    world.job = replace(world.job, deleted=world.now)
    if FINALIZER not in world.job.finalizers:
        # Nothing was created yet, so the job is deleted at once.
        assert not world.pools
        return
    world.run()
    assert world.gone
    assert all(view.ended for view in world.pools.values())
