"""Checkpoints are complete or absent, and belong to their job only."""

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.aggregator.storage import safetensors_file
from isthmus.aggregator.storage.checkpoints import CheckpointError, CheckpointStore
from isthmus.aggregator.storage.round_record import RoundRecord


def store(directory: Path, uid: str = "uid", keep: int = 2) -> CheckpointStore:
    result = CheckpointStore(directory, uid, keep)
    result.open()
    return result


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value), "n": torch.tensor(4)}


def large(value: float, size: int = 700_000) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(size, dtype=torch.float32) + value}


def test_the_newest_checkpoint_is_loaded_and_old_ones_are_removed(tmp_path: Path) -> None:
    for number in range(4):
        saved = store(tmp_path).save(number, state(number))
        store(tmp_path).retire()
    latest = store(tmp_path).latest()
    assert latest is not None
    assert (latest.round, latest.digest) == (3, saved.digest)
    assert latest.state["w"].tolist() == [3.0] * 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "round-000002.safetensors",
        "round-000003.safetensors",
    ]


def test_a_strategys_state_is_stored_and_removed_with_its_model(tmp_path: Path) -> None:
    for number in range(4):
        store(tmp_path).save(number, state(number), {"m/w": torch.full((3,), 10.0 * number)})
        store(tmp_path).retire()
    latest = store(tmp_path).latest()
    assert latest is not None
    assert latest.strategy["m/w"].tolist() == [30.0] * 3
    assert "m/w" not in load_file(latest.file.path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4  # two models, two states


def test_a_retired_checkpoints_file_is_overwritten(tmp_path: Path) -> None:
    checkpoints, files = store(tmp_path, keep=1), set()
    for number in range(6):
        saved = checkpoints.save(number, large(number, 700_000 - 100_000 * number), {"m/w": torch.ones(3)})
        files.add(saved.file.path.stat().st_ino)
        assert torch.equal(load_file(saved.file.path)["w"], saved.state["w"]), "nothing is left of the longer one"
        del saved
        checkpoints.retire()
    assert len(files) == 2, "by turns"


@pytest.mark.parametrize("reading", ["mapped", "opened"])
def test_a_file_that_is_still_read_is_not_overwritten(tmp_path: Path, reading: str) -> None:
    checkpoints = store(tmp_path, keep=1)
    first = checkpoints.save(0, large(0)).file.path
    mapped, opened = safetensors_file.mapped(first) if reading == "mapped" else {}, first.open("rb")
    before = opened.read()
    opened.seek(0)
    if mapped:
        opened.close()
    inode = first.stat().st_ino
    for number in (1, 2):
        saved = checkpoints.save(number, large(number))
        checkpoints.retire()
        assert saved.file.path.stat().st_ino != inode
    assert torch.equal(mapped["w"], large(0)["w"]) if mapped else opened.read() == before
    opened.close()


def test_spare_files_are_removed_after_training(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    for number in range(3):
        saved = checkpoints.save(number, state(number), {"m/w": torch.ones(3)})
        checkpoints.retire()
    assert list(tmp_path.rglob("*.spare"))
    checkpoints.write_final(saved)
    assert not list(tmp_path.rglob("*.spare"))
    checkpoints.save(3, state(3))
    checkpoints.retire()
    store(tmp_path)
    assert not list(tmp_path.rglob("*.spare")), "nor a restart"


def test_a_strategys_state_without_its_model_does_not_count(tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1), {"m/w": torch.ones(3)})
    store(tmp_path).save(2, state(2), {"m/w": torch.ones(3)}).file.path.unlink()
    latest = store(tmp_path).latest()
    assert latest is not None
    assert (latest.round, latest.strategy["m/w"].tolist()) == (1, [1.0] * 3)
    store(tmp_path).save(2, state(2))
    latest = store(tmp_path).latest()
    assert latest is not None
    assert (latest.round, latest.strategy) == (2, {})


def test_an_empty_directory(tmp_path: Path) -> None:
    assert store(tmp_path).latest() is None


def test_incomplete_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1))
    leftover = tmp_path / "checkpoints" / "round-000002.partial"
    leftover.write_bytes(b"half")
    latest = store(tmp_path).latest()
    assert latest is not None
    assert latest.round == 1
    assert not leftover.exists()


def test_another_jobs_checkpoints_are_refused(tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1))
    with pytest.raises(CheckpointError, match=r"checkpoints of another job \(uid uid\); use an empty directory"):
        store(tmp_path, uid="other").latest()
    # Except those of the job that this job continues.
    latest = CheckpointStore(tmp_path, "other", 2, former="uid").latest()
    assert latest is not None and latest.round == 1
    with pytest.raises(CheckpointError, match=r"checkpoints of another job \(uid uid\)"):
        CheckpointStore(tmp_path, "other", 2, former="third").latest()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    saved = store(tmp_path).save(1, state(1))
    saved.file.path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"round-000001.safetensors cannot be read .*; remove it"):
        store(tmp_path).latest()


def test_the_final_model_loads_with_plain_libraries(tmp_path: Path) -> None:
    saved = store(tmp_path).save(5, state(2))
    path, _ = store(tmp_path).write_final(saved)
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    for loaded in (plain, load_file(path)):
        assert loaded["w"].tolist() == [2.0] * 3
        assert loaded["n"].item() == 4


def test_an_incomplete_line_and_uncommitted_rounds_are_skipped(tmp_path: Path) -> None:
    records = store(tmp_path)
    records.append(RoundRecord(1, 0.5, 2, 10, {"train_loss": 1.0}))
    records.append(RoundRecord(1, 0.5, 2, 10, {"train_loss": 1.0, "accuracy": 0.5}))
    records.append(RoundRecord(2, 0.5, 2, 10))
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "sec')
    assert [(record.round, record.metrics) for record in records.records(1)] == [
        (1, {"train_loss": 1.0, "accuracy": 0.5})
    ]


def test_records_of_older_and_newer_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text(
        '{"round": 1, "seconds": 0.5, "updates": 2, "examples": 10, "metrics": {}, "time": 7.0}\n'
        "[]\n"
        '{"round": 2, "seconds": 0.5, "updates": 2, "examples": 10, "late": 1, "yet_unheard_of": {}}\n'
    )
    assert [(record.round, record.late, record.stages) for record in store(tmp_path).records(9)] == [
        (1, 0, {}),
        (2, 1, {}),
    ]


def test_a_record_after_an_incomplete_line_is_complete(tmp_path: Path) -> None:
    records = store(tmp_path)
    records.append(RoundRecord(1, 0.5, 2, 10))
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "sec')
    records.append(RoundRecord(2, 0.5, 2, 10))
    records.append(RoundRecord(3, 0.5, 2, 10))
    assert [record.round for record in records.records(9)] == [1, 2, 3]
    assert (tmp_path / "rounds.jsonl").read_text().count("\n\n") == 0


def test_a_full_disk_leaves_no_incomplete_file(
    tmp_path: Path, file_size_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    saved = store(tmp_path).save(1, {"w": torch.zeros(100_000)})
    large = {"w": torch.zeros(100_000)}
    with file_size_limit(100_000):
        for state in (large, {"w": torch.zeros(1_000_000)}):  # written in one piece and in several
            with pytest.raises(OSError, match="File too large"):
                store(tmp_path).save(2, state)
        with pytest.raises(OSError, match="File too large"):
            store(tmp_path).save(2, {"w": torch.zeros(3)}, large)
        with pytest.raises(OSError, match="File too large"):
            store(tmp_path).write_final(saved)
        assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["round-000001.safetensors"]
    latest = store(tmp_path).latest()
    assert latest is not None
    assert (latest.round, latest.digest) == (1, saved.digest)
    assert store(tmp_path).save(2, large).round == 2
    store(tmp_path).write_final(saved)
    assert len(torch.load(tmp_path / "model.pt", weights_only=True)["w"]) == 100_000


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Make writes of this process fail beyond a file size, as on a full disk, in the middle of a write."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def test_wanted_checkpoints_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "uid", keep=2)
    store.open()
    for number in range(6):
        store.save(number, {"w": torch.full((3,), float(number))})
        store.retire({1})
    assert store.numbers() == [1, 4, 5]
    store.retire()
    assert store.numbers() == [4, 5]


@pytest.mark.parametrize("links", [True, False])
def test_the_best_model_beside_the_final_one(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(here: Path, there: Path) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = CheckpointStore(tmp_path, "uid", keep=9)
    store.open()
    models = [store.save(number, {"w": torch.full((3,), float(number))}) for number in (1, 2)]
    _, final = store.write_final(models[1])

    def best() -> float:
        return float(torch.load(tmp_path / "model-best.pt", weights_only=True)["w"][0])

    assert store.write_best(2, 2) == (tmp_path / "model-best.safetensors", final)
    assert best() == 2
    written = store.write_best(1, 2)
    assert written is not None and written[1] == safetensors_file.sha256_of(tmp_path / "model-best.safetensors")
    assert best() == 1
    store.write_final(models[0])  # writes a new file
    assert best() == 1
    assert store.write_best(None, 2) is None
    assert not (tmp_path / "model-best.pt").exists()
