"""Models in the status have the hash of their own file, and the newest is shown in the end."""

import asyncio
import hashlib
from pathlib import Path

import pytest
import torch

from isthmus.aggregator.rounds import model_publisher
from isthmus.aggregator.rounds.model_publisher import ModelPublisher
from isthmus.aggregator.state.notifier import Notifier
from isthmus.aggregator.storage.checkpoints import Checkpoint, CheckpointStore
from isthmus.aggregator.storage.safetensors_file import sha256_of


class Watched(ModelPublisher):
    """A publisher whose changes a test can wait for."""

    def __init__(self, directory: Path) -> None:
        self.notifier = Notifier()
        super().__init__(directory, self.notifier)

    async def shown(self, number: int) -> None:
        async with asyncio.timeout(30):
            async for _ in self.notifier.listen():
                if self.newest is not None and self.newest.round >= number:
                    return

    @property
    def told(self) -> tuple[str, int, str]:
        assert self.newest is not None
        return self.newest.path, self.newest.round, self.newest.sha256


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    result = CheckpointStore(tmp_path, "uid", 1)
    result.open()
    return result


@pytest.fixture
def published(store: CheckpointStore) -> Watched:
    return Watched(store.directory)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every model as large."""
    monkeypatch.setattr(model_publisher, "SMALL_BYTES", 0)


def saved(store: CheckpointStore, number: int) -> Checkpoint:
    return store.save(number, {"w": torch.full((1000,), float(number))})


async def test_a_small_model_is_shown_at_once(published: Watched, store: CheckpointStore) -> None:
    published.publish(saved(store, 1))
    path = "checkpoints/round-000001.safetensors"
    assert published.told == (path, 1, hashlib.sha256((store.directory / path).read_bytes()).hexdigest())


@pytest.mark.usefixtures("large")
async def test_a_large_one_is_shown_once_it_is_hashed_and_the_newest_in_the_end(
    published: Watched, store: CheckpointStore
) -> None:
    for number in range(1, 6):
        published.publish(saved(store, number))
        assert published.newest is None
    await published.shown(5)
    path, _, sha256 = published.told
    assert sha256 == sha256_of(store.directory / path)
    published.publish(saved(store, 6))
    await published.shown(6)


@pytest.mark.usefixtures("large")
async def test_a_model_that_was_removed_meanwhile_is_skipped(published: Watched, store: CheckpointStore) -> None:
    lost = saved(store, 1)
    lost.file.path.unlink()
    published.publish(lost)
    await asyncio.sleep(0)
    published.publish(saved(store, 2))
    await published.shown(2)


@pytest.mark.usefixtures("large")
async def test_the_final_model_is_the_last(published: Watched, store: CheckpointStore) -> None:
    checkpoint = saved(store, 3)
    published.publish(checkpoint)
    await asyncio.sleep(0)
    hashing = asyncio.all_tasks() - {asyncio.current_task()}
    final, sha256 = store.write_final(checkpoint)
    published.finish(final, 3, sha256)
    await asyncio.gather(*hashing, return_exceptions=True)
    assert published.told == ("model.safetensors", 3, sha256_of(final))


async def test_the_best_is_shown_beside_the_newest(published: Watched, store: CheckpointStore) -> None:
    """This includes a best model that an earlier process hashed."""
    first = saved(store, 1)
    published.publish(first)
    published.publish_best(1, first.file.path)
    assert published.best == published.newest
    second = saved(store, 2)
    published.publish(second)
    assert published.best is not None and published.best.round == 1
    restarted = Watched(store.directory)
    restarted.publish(second)
    restarted.publish_best(1, first.file.path)
    assert restarted.best == published.best
    restarted.publish_best(7, store.path(7))  # its file does not exist
    assert restarted.newest is not None and restarted.newest.round == 2


@pytest.mark.usefixtures("large")
async def test_a_large_best_model_does_not_wait_behind_newer_ones(
    published: Watched, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_publisher, "_REST", 0)
    first = saved(store, 1)
    published.publish_best(1, first.file.path)
    number = 2
    async with asyncio.timeout(30):
        while published.best is None:
            published.publish(saved(store, number))
            number += 1
            await asyncio.sleep(0)
    assert published.best.sha256 == sha256_of(first.file.path)
