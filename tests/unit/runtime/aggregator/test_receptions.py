"""Slots for the reception of updates: in memory, or in a file if a slow client blocks the queue."""

import asyncio
import errno
import math
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isthmus.aggregator.updates import receive_slots
from isthmus.aggregator.updates.receive_slots import ReceiveSlots, in_file
from isthmus.tensors import RawDecoder, State, checksum_of, chunks_of, specs_of

STATE: State = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.ones((), dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "steps": torch.tensor([1, 2, 3], dtype=torch.int16),
}


def large() -> Any:
    """A model so large that only one update has a slot in memory."""
    return SimpleNamespace(size=receive_slots.RECEPTION_BYTES, specs=specs_of(STATE))


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_slots, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(receive_slots, "BYTES_PER_SECOND", math.inf)


def test_an_update_received_into_a_file_is_unchanged(tmp_path: Path) -> None:
    room = in_file(specs_of(STATE), tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    reception = RawDecoder(specs_of(STATE), room)
    for chunk in chunks_of(STATE):
        reception.write(chunk)
    received = reception.finish(checksum_of(STATE))
    for name, tensor in STATE.items():
        assert torch.equal(received[name], tensor), name
    assert received["weight"].data_ptr() == room["weight"].data_ptr()


def test_an_update_behind_a_slow_client_is_received_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr(receive_slots, "SMALL_BYTES", 0)

    async def run() -> None:
        places = ReceiveSlots(tmp_path)
        model = large()
        async with places.slot(model) as slow:
            assert slow == {}
            async with places.slot(model) as quick:
                assert set(quick) == {"weight", "bias", "steps"}
                places.give_back(quick)
        # Memory is reused, but not that of the file.
        kept = {name: tensor.clone() for name, tensor in STATE.items()}
        places.give_back(kept)
        async with places.slot(model) as room:
            assert room is kept

    asyncio.run(run())


async def twelve_clients(places: ReceiveSlots, rooms: list[State], work: Callable[[], Awaitable[object]]) -> None:
    model = large()

    async def client() -> None:
        async with AsyncExitStack() as stack:
            room = await stack.enter_async_context(places.ticket(model))
            rooms.append(await stack.enter_async_context(places.slot(model)) if room is None else room)
            await work()

    await asyncio.gather(*(client() for _ in range(12)))


def test_clients_wait_in_a_moving_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr(receive_slots, "SECONDS_OF_EACH", 0.5)
    rooms: list[State] = []
    clients = twelve_clients(ReceiveSlots(tmp_path), rooms, lambda: asyncio.sleep(0.05))
    asyncio.run(asyncio.wait_for(clients, 60))
    assert rooms == [{}] * 12, "each in memory, though the last waited for longer than the grace"


def test_updates_leave_a_blocked_queue_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr(receive_slots, "SECONDS_OF_EACH", 0.001)
    rooms: list[State] = []

    async def until_all_have_begun() -> None:
        while len(rooms) < 12:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(twelve_clients(ReceiveSlots(tmp_path), rooms, until_all_have_begun), 60))
    assert rooms.count({}) == 1


def test_a_long_blocked_queue_is_left_as_soon_as_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind clients that send nothing, each client waits for the time of one update, however long the queue is."""
    impatient(monkeypatch)
    monkeypatch.setattr(receive_slots, "SECONDS_OF_EACH", 0.5)
    times: list[float] = []

    async def run() -> None:
        places, model, stop = ReceiveSlots(tmp_path), large(), asyncio.Event()

        async def hostile() -> None:
            async with places.slot(model):
                times.append(asyncio.get_running_loop().time())
                await stop.wait()

        began = asyncio.get_running_loop().time()
        clients = [asyncio.create_task(hostile()) for _ in range(200)]
        while len(times) < 200:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        # By the length of the queue they would have waited up to 100 s.
        assert max(times) - began < 50

    asyncio.run(run())


def test_files_keep_no_descriptors_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    rooms = [in_file(specs_of(STATE), tmp_path) for _ in range(50)]
    assert len(rooms) == 50 and len(list(Path("/proc/self/fd").iterdir())) < before + 10


def test_there_is_one_ticket_more_than_slots() -> None:
    async def run() -> None:
        places, model = ReceiveSlots(), large()
        async with places.ticket(model), places.ticket(model):
            third = asyncio.ensure_future(places.ticket(model).__aenter__())
            await asyncio.sleep(0)
            assert not third.done()
        await asyncio.wait_for(third, 30)

    asyncio.run(run())


def test_a_client_that_disconnects_while_it_waits_leaves_its_slot_to_others() -> None:
    async def run() -> None:
        places, model = ReceiveSlots(), large()

        async def client() -> None:
            async with places.slot(model):
                pass

        async with places.slot(model):
            first, second = (asyncio.create_task(client()) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()
        await asyncio.wait_for(second, 30)
        assert first.cancelled()
        holder = places.slot(model)
        await holder.__aenter__()
        late = asyncio.create_task(client())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await holder.__aexit__(None, None, None)
        late.cancel()  # at the moment when its slot becomes free
        await asyncio.wait([late])
        await asyncio.wait_for(client(), 30)

    asyncio.run(run())


def test_without_room_for_a_file_updates_wait_for_a_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    impatient(monkeypatch)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)

    async def run() -> None:
        places = ReceiveSlots(tmp_path)
        model = large()
        order: list[str] = []

        async def second() -> None:
            async with places.slot(model) as room:
                order.append("second")
                assert room == {}

        async with places.slot(model):
            task = asyncio.create_task(second())
            while "no file to receive an update into" not in caplog.text:  # noqa: ASYNC110 - nothing else tells
                await asyncio.sleep(0.01)
            order.append("first is done")
        await task
        assert order == ["first is done", "second"]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_file_leaves_room_for_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    model = large()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * model.size))

    async def run() -> None:
        places = ReceiveSlots(tmp_path)
        holder = places.slot(model)
        await holder.__aenter__()
        waiting = asyncio.ensure_future(places.slot(model).__aenter__())
        await asyncio.wait([waiting], timeout=0.3)
        assert not waiting.done(), "there is no room for the file"
        await holder.__aexit__(None, None, None)
        assert await asyncio.wait_for(waiting, 30) == {}

    asyncio.run(run())
