"""Tests of cloud pools that grow while HPC clients are queued."""

from dataclasses import replace
from typing import Any

import pytest

from isthmus_contracts.manifests.manifest import ManifestError, parse_spec
from isthmus_operator.state.job_record import CloudRecord, Record
from isthmus_operator.state.observed import PoolPhase
from tests.support.fake_cluster import UID, World, spec


def bursting(replicas: int = 2, least: int | None = 1, most: int | None = 5, hpc: int = 2) -> dict[str, Any]:
    pools = [
        {"name": "cloud", "replicas": replicas, "cloud": {"minReplicas": least, "maxReplicas": most}},
        {"name": "lumi", "replicas": hpc, "hpc": {"siteRef": {"name": "site"}, "environment": "py"}},
    ]
    return spec(pools=pools, rounds=1000)


class Queue(World):
    """A fake cluster whose Slurm queue does not move by itself."""

    def queue(self, queued: int, running: int) -> None:
        phase = PoolPhase.RUNNING if running else PoolPhase.PENDING
        self.pools = {k: replace(v, phase=phase, queued=queued, running=running) for k, v in self.pools.items()}

    def settle(self, queued: int, running: int) -> set[int]:
        """Return the indices of the cloud clients once nothing changes."""
        for _ in range(12):
            self.step()
            self.tick(5)
            self.queue(queued, running)
        return {pod.index for pod in self.observed.pods if pod.role == "client" and not pod.ended}


def test_it_grows_with_the_queue_and_shrinks_once_the_others_are_there() -> None:
    world = Queue(bursting())
    assert world.settle(2, 0) == {0, 1, 2, 3}
    assert world.job.status["clients"]["total"] == 6
    assert world.settle(1, 1) == {0, 1, 2, 3}  # one is not connected yet, so no client is removed
    assert world.settle(0, 2) == {0}
    assert [pool["desired"] for pool in world.job.status["pools"]] == [1, 2]
    # A requeue: they come back as later attempts, which does not count as a failure.
    assert world.settle(2, 0) == {0, 1, 2, 3}
    assert {pod.attempt for pod in world.observed.pods if pod.index == 3 and pod.role == "client"} == {1}
    assert not [event for event in world.events if event.reason == "ClientFailed"]


def test_it_never_grows_beyond_its_limit() -> None:
    assert Queue(bursting(hpc=50)).settle(50, 0) == {0, 1, 2, 3, 4}


def test_a_site_that_says_nothing_changes_nothing() -> None:
    world = Queue(bursting())
    world.site_up = False
    assert world.settle(0, 0) == {0, 1}


def test_numbers_leave_room_for_the_growth() -> None:
    parsed = parse_spec(bursting())
    assert (parsed.total_clients, parsed.first_client("lumi"), parsed.fewest_trainers, parsed.most_trainers) == (
        7,
        5,
        3,
        7,
    )


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (bursting(replicas=6), "spec.pools[0].cloud: minReplicas, replicas (6) and maxReplicas must rise"),
        (bursting(least=3), "minReplicas, replicas (2) and maxReplicas must rise"),
        (
            spec(pools=[{"name": "c", "cloud": {"maxReplicas": 4}}]),
            "spec.pools[0].cloud.maxReplicas: there is no HPC pool",
        ),
        ({**bursting(), "selection": {"minClients": 4}}, "spec.selection.minClients: 4 is more than the 3 clients"),
    ],
)
def test_what_does_not_fit_is_refused(wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_spec(wanted)
    assert words in str(caught.value)


def test_a_pool_that_has_shrunk_to_nothing_stays_so_while_the_aggregator_does_not_answer() -> None:
    world = Queue(bursting(least=0))
    assert world.settle(0, 2) == set()
    world._federation = lambda: None  # type: ignore[method-assign]
    assert world.settle(0, 2) == set()


@pytest.mark.parametrize("size", [4, 0, None])
def test_the_record_remembers_the_size(size: int | None) -> None:
    record = Record(cloud={"cloud": CloudRecord(started=4, size=size)})
    assert Record.load(record.dump(UID)) == record


def test_a_client_that_is_lost_for_good_is_replaced_by_another() -> None:
    world = Queue({**bursting(hpc=1), "backoffLimit": 0})
    assert world.settle(0, 1) == {0}
    world.fail("demo-cloud-0-0")
    assert world.settle(0, 1) == {1}
    assert not world.condition("Failed").startswith("True")


def test_a_forged_size_in_the_record_moves_the_pool_only_within_its_limits() -> None:
    world = Queue(bursting(), record=Record({"cloud": CloudRecord(0, {}, 900000000)}).dump(UID))
    assert world.settle(0, 0) == {0, 1, 2, 3, 4}
