"""Tests of the work queue: one worker per key, a bound for all, and no lost keys."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from isthmus_operator.controllers.workqueue import WorkQueue


@asynccontextmanager
async def running(
    handle: Callable[[str], Awaitable[float | None]], workers: int = 4, longest: float = 10.0
) -> AsyncIterator[WorkQueue[str]]:
    queue: WorkQueue[str] = WorkQueue(handle, workers=workers, interval=0.0, timeout=longest)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_key_is_worked_on_by_one_at_a_time_and_again_for_news_meanwhile() -> None:
    busy, most, times = 0, 0, 0
    go = asyncio.Event()

    async def handle(_: str) -> None:
        nonlocal busy, most, times
        busy, times = busy + 1, times + 1
        most = max(most, busy)
        await go.wait()
        busy -= 1

    async with running(handle) as queue:
        queue.add("a")
        await until(lambda: times == 1)
        for _ in range(5):
            queue.add("a")
        go.set()
        await until(lambda: times == 2)
        await asyncio.sleep(0.02)
    assert (most, times) == (1, 2)


async def test_no_more_workers_than_allowed() -> None:
    busy, most, done = 0, 0, 0

    async def handle(_: str) -> None:
        nonlocal busy, most, done
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.002)
        busy, done = busy - 1, done + 1

    async with running(handle, workers=3) as queue:
        for number in range(50):
            queue.add(str(number))
        await until(lambda: done == 50)
    assert most == 3


async def test_the_answer_says_when_again_and_news_come_earlier() -> None:
    times = 0

    async def handle(_: str) -> float:
        nonlocal times
        times += 1
        return 3600.0

    async with running(handle) as queue:
        queue.add("a", 0.01)
        await until(lambda: times == 1)
        queue.add("a", 0.01)
        await until(lambda: times == 2)


async def test_an_error_is_tried_again_and_does_not_stop_the_others() -> None:
    seen: list[str] = []

    async def handle(key: str) -> None:
        seen.append(key)
        if key == "bad" and seen.count("bad") < 2:
            raise RuntimeError("no")

    async with running(handle) as queue:
        queue.add("bad")
        queue.add("good")
        await until(lambda: seen.count("bad") == 2 and "good" in seen)


async def test_a_look_that_hangs_is_cut_short() -> None:
    times = 0

    async def handle(_: str) -> None:
        nonlocal times
        times += 1
        if times == 1:
            await asyncio.Event().wait()

    async with running(handle, longest=0.05) as queue:
        queue.add("a")
        await until(lambda: times == 2)
        assert queue.oldest() < 60


async def test_entries_that_earlier_ones_replaced_do_not_pile_up_until_they_would_be_due() -> None:
    looks: dict[str, int] = {}

    async def handle(key: str) -> float | None:
        looks[key] = looks.get(key, 0) + 1
        return 600.0

    async with running(handle) as queue:
        queue.add("earlier than they", 60.0)
        for number in range(500):
            key = f"job-{number % 2}"
            before = looks.get(key, 0)
            queue.add(key)
            await until(lambda: looks.get(key, 0) > before)  # noqa: B023
        assert (queue.count(), len(queue._heap) < 100) == (3, True)
        queue.add("job-0")
        await until(lambda: looks["job-0"] == 251)


async def test_a_cancellation_within_a_pass_is_an_error_like_others() -> None:
    times = 0

    async def handle(_: str) -> float:
        nonlocal times
        times += 1
        if times == 1:
            # A call through a closed channel behaves like this.
            inner = asyncio.ensure_future(asyncio.sleep(60))
            inner.cancel()
            await inner
        return 3600.0

    async with running(handle) as queue:
        queue.add("a")
        await until(lambda: times == 2)
