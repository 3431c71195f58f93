"""The audit log's chain: every change of a line shows, and a bridge that died leaves no fault."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus_bridge.audit import chain
from isthmus_bridge.audit.log import AuditLog


def filled(path: Path, records: int = 4) -> list[bytes]:
    log = AuditLog(path, lambda: 1.5)
    for number in range(records):
        log.append("left", round=number)
    log.close()
    return path.read_bytes().splitlines()


def test_a_record_holds_number_time_and_the_hash_of_the_line_before(tmp_path: Path) -> None:
    first, second = filled(tmp_path / "audit.jsonl", 2)
    assert json.loads(first) == {
        "n": 1, "time": "1970-01-01T00:00:01.500Z", "previous": "0" * 64, "event": "left", "round": 0,
    }  # fmt: skip
    assert json.loads(second)["previous"] == chain.hash_of(first)


def test_the_log_is_private_and_continues_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 2)
    lines = filled(path, 3)
    verdict = chain.verify(lines)
    assert (verdict.records, verdict.faults, verdict.notes) == (5, (), ())
    assert verdict.head == chain.Head(5, chain.hash_of(lines[-1]))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a changed field": lambda lines: [lines[0], lines[1].replace(b'"round":1', b'"round":9'), *lines[2:]],
    "a removed line": lambda lines: [lines[0], *lines[2:]],
    "a removed first line": lambda lines: lines[1:],
    "a repeated line": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "exchanged lines": lambda lines: [lines[0], lines[2], lines[1], lines[3]],
    "a damaged line": lambda lines: [lines[0], b"{", *lines[2:]],
    "an inserted line": lambda lines: [*lines[:2], b'{"n":3,"event":"left"}', *lines[2:]],
    "a number that is no number": lambda lines: [lines[0], lines[1].replace(b'"n":2', b'"n":true'), *lines[2:]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_shows(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = filled(tmp_path / "audit.jsonl")
    assert not chain.verify(lines).faults
    assert chain.verify(change(lines)).faults


def test_removed_last_lines_show_to_someone_who_noted_the_hash(tmp_path: Path) -> None:
    lines = filled(tmp_path / "audit.jsonl")
    noted = chain.verify(lines).head.hash
    assert chain.verify([*lines, *filled(tmp_path / "other.jsonl", 1)[1:]], noted).seen
    assert not chain.verify(lines[:-1], noted).seen


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_line_that_was_not_written_to_its_end_is_no_fault(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 3)
    # The last line's end alone may be missing, too.
    os.truncate(path, path.stat().st_size - cut)
    lines = filled(path, 1)
    verdict = chain.verify(lines)
    assert verdict.faults == ()
    if cut > 1:
        assert json.loads(lines[-2])["event"] == chain.TORN
    assert len(verdict.notes) == (cut > 1)


def test_a_failed_write_leaves_a_log_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, lambda: 1.0)
    log.append("left", round=1)
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            log.append("left", round=2)
    log.append("left", round=3)
    log.close()
    lines = path.read_bytes().splitlines()
    assert chain.verify(lines).faults == ()
    assert [json.loads(line).get("round") for line in (lines[0], *lines[2:])] == [1, None, 3]


def test_a_removed_log_goes_on_in_a_new_file_that_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("left", round=1)
    path.unlink()
    log.append("left", round=2)
    log.close()
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["n"] == 2
    assert chain.verify([line]).faults == ("line 1: is not the first: lines were changed, removed or inserted here",)


def test_the_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        AuditLog(tmp_path / "audit.jsonl")
    assert not (tmp_path / "elsewhere").exists()


def test_many_faults_are_cut(tmp_path: Path) -> None:
    verdict = chain.verify([b"{"] * 1000)
    assert verdict.faults[-1] == "and more"
    assert len(verdict.faults) < 30
