"""Tasks end even if a library has swallowed their first cancellation."""

import asyncio

import pytest

from isthmus_contracts.process import asyncio_tasks


def test_a_task_that_misses_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio_tasks, "_AGAIN", 0.01)
    heard = 0

    async def deaf() -> None:
        nonlocal heard
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                heard += 1
                if heard == 3:
                    raise

    async def failing() -> None:
        raise ValueError("its own business")

    async def run() -> None:
        begun = [asyncio.create_task(deaf()), asyncio.create_task(failing())]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio_tasks.end(begun), 30)
        assert all(task.done() for task in begun)
        await asyncio_tasks.end([])

    asyncio.run(run())
    assert heard == 3
