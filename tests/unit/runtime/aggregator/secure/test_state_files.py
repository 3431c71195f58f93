"""Files of secure aggregation in the state directory."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.aggregator.secure.accumulator import AccumulatorFile
from isthmus.aggregator.secure.durable_state import DurableState
from isthmus.aggregator.secure.incarnations import Incarnations
from isthmus.aggregator.secure.journal import Entry, JournalFile
from isthmus.tensors import specs_of

STATE = {"w": torch.zeros(3, 5, dtype=torch.int32), "b": torch.zeros((), dtype=torch.int16),
         "isthmus.scalars": torch.zeros(4, dtype=torch.int64)}  # fmt: skip
SPECS = specs_of(STATE)
ENTRY = Entry("uid", 3, "digest", 1, 2, "sum", (("a", 0), ("b", 1)), (("b", 1),), b"\x00\xff")


def test_numbers_follow_the_clock(tmp_path: Path) -> None:
    now = [1000]
    numbers = Incarnations(tmp_path / "n", lambda: now[0])
    assert [numbers.next(), numbers.next()] == [1000, 1001]
    now[0] = 5000
    assert numbers.next() == 5000


def test_numbers_grow_over_restarts_even_if_the_clock_is_set_back(tmp_path: Path) -> None:
    used = [Incarnations(tmp_path / "n", lambda: 10**18).next()]
    for clock in (10**18, 5, 10**18 + 1):
        counter = Incarnations(tmp_path / "n", lambda clock=clock: clock)  # type: ignore[misc]
        used += [counter.next() for _ in range(3)]
    assert used == sorted(set(used))


def test_a_number_is_reserved_before_it_is_used(tmp_path: Path) -> None:
    counter = Incarnations(tmp_path / "gone" / "n", lambda: 7)
    with pytest.raises(FileNotFoundError):
        counter.next()
    (tmp_path / "gone").mkdir()
    number = counter.next()
    assert int((tmp_path / "gone" / "n").read_text()) >= number


def test_a_sum_survives_its_process(tmp_path: Path) -> None:
    first = AccumulatorFile(tmp_path / "sum").allocate(SPECS)
    for number, total in enumerate(first.values()):
        total.fill_(number + 1)
    again = AccumulatorFile(tmp_path / "sum").private(SPECS)
    assert list(again) == list(STATE)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert all(
        again[name].dtype == tensor.dtype and again[name].shape == tensor.shape for name, tensor in STATE.items()
    )


def test_changes_of_a_private_sum_leave_the_file_as_it_is(tmp_path: Path) -> None:
    file = AccumulatorFile(tmp_path / "sum")
    shared = file.allocate(SPECS)
    shared["w"].fill_(7)
    private = file.private(SPECS)
    private["w"].sub_(7)
    assert int(private["w"].abs().sum()) == 0
    assert int(shared["w"].sum()) == int(file.private(SPECS)["w"].sum()) == 7 * 15


def test_the_memory_of_a_sum_is_used_again(tmp_path: Path) -> None:
    file = AccumulatorFile(tmp_path / "sum")
    first = file.allocate(SPECS)
    assert file.allocate(SPECS)["w"].data_ptr() == first["w"].data_ptr()
    other = specs_of({"w": torch.zeros(2, dtype=torch.int64)})
    assert file.allocate(other)["w"].tolist() == [0, 0]
    with pytest.raises(OSError, match="bytes, not"):
        file.private(SPECS)


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = AccumulatorFile(tmp_path / "sum")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        file.allocate(SPECS)
    monkeypatch.undo()
    assert set(file.allocate(SPECS)) == set(STATE)


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "journal")
    assert journal.read() is None
    journal.write(ENTRY, sync=True)
    assert JournalFile(tmp_path / "journal").read() == ENTRY
    journal.remove()
    assert journal.read() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"contributors": 3}', "\x00"])
def test_a_damaged_journal_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal").write_text(text)
    assert JournalFile(tmp_path / "journal").read() is None


def test_a_journal_belongs_to_one_round_and_one_kind_of_sum() -> None:
    assert ENTRY.is_of("uid", 3, "digest", 1)
    for other in (("x", 3, "digest", 1), ("uid", 4, "digest", 1), ("uid", 3, "x", 1), ("uid", 3, "digest", 2)):
        assert not ENTRY.is_of(*other)


@pytest.mark.parametrize(("attempt", "durable"), [(0, False), (1, True)])
async def test_lost_sums_are_counted_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int, durable: bool
) -> None:
    """The entry of a new instance replaces the one that has counted them."""

    async def at_once(_: str, write: Any) -> Any:
        return write()

    state = DurableState(tmp_path, at_once)
    assert await state.open() is None
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    state.note(replace(ENTRY, attempt=attempt))
    directory = tmp_path / "secure"
    assert synced == ([directory / ".journal.new", directory] if durable else [])
    assert await state.open() == replace(ENTRY, attempt=attempt)
