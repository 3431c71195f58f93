"""The status tells of a model with the hash of its very file, and of the newest one in the end."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from isthmus.aggregator import publisher
from isthmus.aggregator.bell import Bell
from isthmus.aggregator.checkpoints import Checkpoint, CheckpointStore
from isthmus.aggregator.publisher import Publisher, sha256_of

Body = Callable[["Watched", CheckpointStore], Awaitable[None]]


class Watched(Publisher):
    """Whose news one can wait for."""

    def __init__(self, directory: Path) -> None:
        self.bell = Bell()
        super().__init__(directory, self.bell)

    async def shown(self, number: int) -> None:
        async with asyncio.timeout(30):
            async for _ in self.bell.listen():
                if self.newest is not None and self.newest.round >= number:
                    return


def run(directory: Path, body: Body) -> None:
    async def main() -> None:
        store = CheckpointStore(directory, "uid", 1)
        store.open()
        await body(Watched(directory), store)

    asyncio.run(main())


def saved(store: CheckpointStore, number: int) -> Checkpoint:
    return store.save(number, {"w": torch.full((1000,), float(number))})


def told(published: Watched) -> tuple[str, int, str]:
    assert published.newest is not None
    return published.newest.path, published.newest.round, published.newest.sha256


def test_a_small_model_is_shown_at_once(tmp_path: Path) -> None:
    async def body(published: Watched, store: CheckpointStore) -> None:
        published.publish(saved(store, 1))
        path = "checkpoints/round-000001.safetensors"
        assert told(published) == (path, 1, hashlib.sha256((tmp_path / path).read_bytes()).hexdigest())

    run(tmp_path, body)


def test_a_large_one_is_shown_once_it_is_hashed_and_the_newest_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "SMALL_BYTES", 0)

    async def body(published: Watched, store: CheckpointStore) -> None:
        for number in range(1, 6):
            published.publish(saved(store, number))
            assert published.newest is None
        await published.shown(5)
        path, _, sha256 = told(published)
        assert sha256 == sha256_of(tmp_path / path)
        published.publish(saved(store, 6))
        await published.shown(6)

    run(tmp_path, body)


def test_a_model_that_was_retired_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "SMALL_BYTES", 0)

    async def body(published: Watched, store: CheckpointStore) -> None:
        lost = saved(store, 1)
        lost.file.path.unlink()
        published.publish(lost)
        await asyncio.sleep(0)
        published.publish(saved(store, 2))
        await published.shown(2)

    run(tmp_path, body)


def test_nothing_comes_after_the_final_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "SMALL_BYTES", 0)

    async def body(published: Watched, store: CheckpointStore) -> None:
        checkpoint = saved(store, 3)
        published.publish(checkpoint)
        await asyncio.sleep(0)
        final = store.write_final(checkpoint)
        published.finish(final, 3, sha256_of(final))
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
        assert told(published) == ("model.safetensors", 3, sha256_of(final))

    run(tmp_path, body)
