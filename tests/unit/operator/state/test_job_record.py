"""Tests that a job's record fits into an annotation."""

import random
from dataclasses import replace

import pytest

from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.state.job_record import ROOM, ArrayKey, ClientRecord, CloudRecord, Record, Setback
from isthmus_operator.state.job_store import parse_job
from tests.support.fake_cluster import NOW, UID, array, job, of_kind, plan, spec, standing


def of_clients(count: int) -> Record:
    """Return a record of clients with random failures."""
    chance = random.Random(7)  # noqa: S311
    clients = {}
    for index in range(count):
        attempt = chance.randint(1, 40)
        clients[index] = ClientRecord(attempt, chance.randint(0, 6), attempt - 1)
    return Record(cloud={"cloud": CloudRecord(count, clients)})


def test_a_record_that_fits_is_unchanged() -> None:
    record = of_clients(20_000)
    assert record.bounded(UID, ROOM) == of_clients(20_000).dump(UID)
    assert record == of_clients(20_000)


@pytest.mark.parametrize("count", [60_000, 100_000])
def test_the_worst_case_of_clients_fits_and_no_number_is_used_twice(count: int) -> None:
    whole, record = of_clients(count), of_clients(count)
    assert len(whole.dump(UID)) > 256 * 1024
    text = record.bounded(UID, ROOM)
    assert 0.8 * ROOM < len(text) <= ROOM
    known, before = Record.load(text, UID).cloud["cloud"], whole.cloud["cloud"]
    assert known.started == count
    dropped = set(before.clients) - set(known.clients)
    assert known.floor == max(before.clients[index].attempt for index in dropped)
    assert all(known.client(index).attempt >= before.client(index).attempt for index in range(count))
    # The entries with the most failures are kept longest.
    assert max(before.clients[index].failures for index in dropped) <= min(
        entry.failures for entry in known.clients.values()
    )
    assert Record.load(text, UID).bounded(UID, ROOM) == text


def test_the_words_of_hpc_pools_go_first() -> None:
    record = of_clients(20_000)
    for number in range(64):
        record.hpc[ArrayKey(f"pool-{number}")] = array(attempt=3, setback=Setback("x" * 4000))
    text = record.bounded(UID, ROOM)
    assert len(text) <= ROOM
    known = Record.load(text, UID)
    assert len(known.cloud["cloud"].clients) == 20_000
    assert {len(entry.setback.message) for entry in known.hpc.values()} == {80}
    assert {entry.attempt for entry in known.hpc.values()} == {3}


def test_a_client_that_was_dropped_from_the_record_starts_above_every_number_it_had() -> None:
    pool = CloudRecord(2, {}, floor=9)
    decided = plan(job(record=Record(cloud={"cloud": pool}).dump(UID)), standing(), NOW, PlanOptions())
    created = [item.name for item in of_kind(decided, act.CreatePod)]
    assert created == ["demo-aggregator", "demo-cloud-0-10", "demo-cloud-1-10"]


def test_other_annotations_leave_less_room() -> None:
    body = {
        "metadata": {
            "name": "demo", "namespace": "team", "uid": UID, "creationTimestamp": "2030-01-01T00:00:00Z",
            "annotations": {"isthmus.dev/record": "r" * 1000},
        }
    }  # fmt: skip
    assert parse_job(body).record_room == ROOM
    body["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = "é" * 70_000  # type: ignore[index]
    room = parse_job(body).record_room
    assert 110_000 < room < 256 * 1024 - 140_000
    clients = Record(cloud={"cloud": of_clients(60_000).cloud["cloud"]})
    big = spec(cloud=60_000)
    decided = plan(replace(job(big, record=clients.dump(UID)), record_room=room), standing(big), NOW, PlanOptions())
    saved = decided.actions[0]
    assert isinstance(saved, act.SaveJob) and saved.record is not None and len(saved.record) <= room
