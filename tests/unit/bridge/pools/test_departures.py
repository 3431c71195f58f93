"""Clients' reports of sent messages reach the audit log once, whatever a job writes into its files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus_bridge.audit import chain
from isthmus_bridge.files.run_directory import AUDIT_FOLDER, RunDirectory
from isthmus_bridge.pools import departures
from isthmus_bridge.pools.departures import MOST_OF_CLIENT
from isthmus_bridge.pools.housekeeping import clean_up
from isthmus_contracts.identities import AUDIT_FILE
from isthmus_contracts.wire.departures import Departure
from tests.support.fake_slurm import KEY, World, checked_world


def departure(round_number: int = 1, **changes: Any) -> Departure:
    fields: dict[str, Any] = {
        "time": 5.0, "job": "5e2b-uid", "pool": "lumi", "index": 0, "round": round_number, "incarnation": 7,
        "size": 1000, "sha256": "ab" * 32, "protection": "secure-aggregation",
    }  # fmt: skip
    return Departure(**(fields | changes))


def file_of(world: World, index: int = 0) -> Path:
    folder = world.policy.run_dir / KEY / "work" / str(index) / AUDIT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder / AUDIT_FILE


def records(world: World, *events: str) -> list[dict[str, Any]]:
    lines = world.policy.audit_path.read_bytes().splitlines()
    assert chain.verify(lines).faults == ()
    found = [json.loads(line) for line in lines]
    return [record for record in found if record["event"] in events]


CLIENTS = ("left", "malformed", "restarted", "limit")


@pytest.fixture
def running(world: World) -> World:
    world.ensure()
    world.tick()
    world.array().states = ["RUNNING"] * 3
    world.tick()
    return world


def finish(world: World) -> None:
    world.array().states = ["COMPLETED"] * 3
    world.tick(times=2)
    assert world.phase() == "SUCCEEDED"


def test_a_pools_life_is_recorded(running: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file_of(running, 1).write_bytes(departure(1).line() + departure(2).line())
    running.tick(31)
    file_of(running, 1).open("ab").write(departure(3).line())
    finish(running)
    assert [record["event"] for record in records(running, "accepted", *CLIENTS, "ended")] == [
        "accepted", "left", "left", "left", "ended",
    ]  # fmt: skip
    accepted, first, *_, ended = records(running, "accepted", "left", "ended")
    assert (accepted["job"], accepted["pool"], accepted["replicas"]) == ("default/fashion", "lumi", 3)
    left = {name: first[name] for name in ("reported_by", "key", "job", "job_uid", "pool", "index", "offset", "round")}
    assert left == {
        "reported_by": "client", "key": KEY, "job": "default/fashion", "job_uid": "5e2b-uid", "pool": "lumi",
        "index": 1, "offset": 0, "round": 1,
    }  # fmt: skip
    assert first["client_time"] == 5.0
    assert (first["incarnation"], first["size"], first["sha256"]) == (7, 1000, "ab" * 32)
    assert (ended["state"], ended["slurm_job"]) == ("SUCCEEDED", 100)
    noted = [record.__dict__["audit_hash"] for record in caplog.records if "audit_hash" in record.__dict__]
    assert noted == [chain.hash_of(running.policy.audit_path.read_bytes().splitlines()[-1])]


def test_lines_are_recorded_once_over_restarts_of_the_bridge(running: World) -> None:
    file = file_of(running)
    for number in range(1, 4):
        file.open("ab").write(departure(number).line())
        running.tick(31)
        running.boot()
    finish(running)
    assert [record["round"] for record in records(running, "left")] == [1, 2, 3]


def test_a_line_is_read_when_it_is_complete(running: World) -> None:
    line = departure(1).line()
    file = file_of(running)
    file.write_bytes(line[:20])
    running.tick(31)
    assert records(running, *CLIENTS) == []
    file.open("ab").write(line[20:])
    running.tick(31)
    assert [record["round"] for record in records(running, *CLIENTS)] == [1]


def test_lines_of_other_jobs_and_malformed_ones_are_counted_only(running: World) -> None:
    bad = [b"\x1b[31mhello", b'{"round": 1}', departure(job="other").line().strip(), departure(pool="x").line().strip()]
    file_of(running, 2).write_bytes(b"\n".join([*bad, departure(4).line().strip(), b""]))
    running.tick(31)
    left, malformed = records(running, *CLIENTS)
    assert (left["round"], left["index"]) == (4, 2)
    assert (malformed["event"], malformed["lines"], malformed["index"]) == ("malformed", 4, 2)
    assert b"hello" not in running.policy.audit_path.read_bytes()


def test_an_endless_line_is_skipped_in_pieces(running: World) -> None:
    file_of(running).write_bytes(b"x" * 100_000 + b"\n" + departure(1).line())
    finish(running)
    assert [record["round"] for record in records(running, "left")] == [1]
    assert sum(record["lines"] for record in records(running, "malformed")) == 2


def test_a_file_that_became_shorter_is_read_again_and_noted(running: World) -> None:
    file = file_of(running)
    file.write_bytes(departure(1).line() + departure(2).line())
    running.tick(31)
    file.write_bytes(departure(3).line())
    running.tick(31)
    assert [record["event"] for record in records(running, *CLIENTS)] == ["left", "left", "restarted", "left"]


def test_no_client_can_fill_the_log(running: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "MOST_OF_CLIENT", 3000)
    file = file_of(running)
    for number in range(1, 40):
        file.write_bytes(departure(number).line())
        running.tick(31)
        file.write_bytes(b"")
        running.tick(31)
    assert len(records(running, *CLIENTS)) < 10
    assert records(running, "limit")
    file_of(running, 1).write_bytes(departure(99).line())
    running.tick(31)
    assert [record["round"] for record in records(running, "left") if record["index"] == 1] == [99]
    assert MOST_OF_CLIENT > 1_000_000


def test_pipes_and_links_are_not_followed(running: World, tmp_path: Path) -> None:
    os.mkfifo(file_of(running, 0))
    (tmp_path / "secret").write_bytes(departure(1).line())
    file_of(running, 1).symlink_to(tmp_path / "secret")
    file_of(running, 2).mkdir()
    running.tick(31)
    finish(running)
    assert records(running, *CLIENTS) == []


def test_lines_that_a_dying_bridge_left_are_collected_before_the_files_go(running: World) -> None:
    file_of(running).write_bytes(departure(1).line())
    assert running.journal is not None
    entry = running.entry()
    running.journal.update(KEY, state=type(entry.state).SUCCEEDED, finished_at=running.now)
    assert records(running, "left") == []
    clean_up(running.policy, running.journal, running.auditor, running.now + 1)
    assert [record["round"] for record in records(running, "left")] == [1]
    assert not (running.policy.run_dir / KEY / "tls").exists()


def test_a_full_disk_delays_the_records_and_loses_none(running: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(running).write_bytes(departure(1).line())
    with monkeypatch.context() as patched:
        patched.setattr(running.auditor, "left", _full)
        running.tick(31)
    running.tick(31)
    assert [record["round"] for record in records(running, "left")] == [1]


def _full(records: object) -> None:
    raise OSError(28, "No space left on device")


def test_without_a_record_nothing_is_submitted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.audit_log is not None
    with monkeypatch.context() as patched:
        patched.setattr(world.audit_log, "append", lambda *_, **__: _full(()))
        with pytest.raises(OSError, match="No space"):
            world.ensure()
    world.tick(times=3)
    assert world.slurm.submissions == 0
    world.ensure()
    world.tick()
    assert world.slurm.submissions == 1


def test_a_pool_of_a_part_reports_the_clients_index_in_the_whole_pool(world: World) -> None:
    world.ensure(first_index=10)
    world.tick()
    file_of(world, 1).write_bytes(departure(1, index=11).line())
    world.tick(31)
    assert [record["index"] for record in records(world, "left")] == [11]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with checked_world(tmp_path_factory.mktemp("hostile")) as world:
        world.ensure()
        world.tick()
        yield world


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=200), st.just(b"\n"), st.just(departure(1).line())), max_size=20))
def test_whatever_a_job_writes_the_log_stays_a_chain_of_printable_lines(hostile: World, parts: list[bytes]) -> None:
    file_of(hostile).write_bytes(b"".join(parts))
    hostile.tick(31)
    records(hostile)
    assert hostile.policy.audit_path.read_text("ascii").replace("\n", "").isprintable()


def test_offsets_that_a_job_has_damaged_are_taken_for_none(running: World) -> None:
    file_of(running).write_bytes(departure(1).line())
    running.tick(31)
    for content in (b"{", b'{"0": []}', b'{"x": [1, 2]}', b"[]", b"[" * 100_000):
        (running.policy.run_dir / KEY / "audit-offsets.json").write_bytes(content)
        running.tick(31)
    assert {record["offset"] for record in records(running, "left")} == {0}


def test_a_run_directory_reads_within_its_bounds(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, KEY)
    run.create({})
    for index in range(4):
        folder = tmp_path / KEY / "work" / str(index) / AUDIT_FOLDER
        folder.mkdir(parents=True)
        (folder / AUDIT_FILE).write_bytes(bytes([65 + index]) * 100)
    (tmp_path / KEY / "work" / "x1").mkdir()
    assert run.departures({1: 40, 2: 100, 3: 101}, frozenset({0}), 50, 1000) == {1: (40, b"B" * 50), 3: (0, b"D" * 50)}
    assert run.departures({}, frozenset(), 50, 80) == {0: (0, b"A" * 50), 1: (0, b"B" * 30)}
