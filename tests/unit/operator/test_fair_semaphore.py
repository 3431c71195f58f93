"""Tests of the semaphore: fair between groups, with slots released during remote calls."""

import asyncio

import pytest

from isthmus_operator.fair_semaphore import CURRENT_SLOT, FairSemaphore, Slot, slot_released


async def granted(semaphore: FairSemaphore, group: str) -> bool:
    """Return True if a slot is granted at once."""
    task = asyncio.create_task(semaphore.acquire(group))
    await asyncio.sleep(0)
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def test_a_group_that_has_nothing_under_way_need_not_wait_for_the_others() -> None:
    semaphore = FairSemaphore(2)
    assert [await granted(semaphore, "busy") for _ in range(3)] == [True, True, False]
    assert await granted(semaphore, "other")
    assert not await granted(semaphore, "other")
    # Up to a bound.
    assert [await granted(semaphore, f"g{number}") for number in range(6)] == [True] * 5 + [False]


async def test_groups_take_turns_at_what_becomes_free() -> None:
    semaphore, order = FairSemaphore(1), []

    async def work(group: str) -> None:
        await semaphore.acquire(group)
        order.append(group)
        await asyncio.sleep(0)
        semaphore.release(group)

    for group in ("a", "b", "c"):
        await semaphore.acquire(group)
    tasks = [asyncio.create_task(work(group)) for group in ("a", "a", "a", "b", "c")]
    await asyncio.sleep(0)
    assert order == []
    for group in ("a", "b", "c"):
        semaphore.release(group)
    await asyncio.gather(*tasks)
    assert sorted(order) == ["a", "a", "a", "b", "c"]
    assert set(order[:3]) == {"a", "b", "c"}
    assert semaphore.taken == 0


async def test_one_that_was_waited_for_in_vain_is_not_lost() -> None:
    semaphore = FairSemaphore(1)
    await semaphore.acquire("a")
    waiting = asyncio.create_task(semaphore.acquire("a"))
    await asyncio.sleep(0)
    semaphore.release("a")
    waiting.cancel()  # at the moment when it is granted
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert semaphore.taken == 0
    assert await granted(semaphore, "a")


async def test_a_remote_call_gives_the_turn_up_and_takes_it_again() -> None:
    semaphore, may = FairSemaphore(1), asyncio.Event()
    slot = Slot(semaphore, "a")
    CURRENT_SLOT.set(slot)
    await slot.acquire()

    async def call() -> None:
        async with slot_released():
            await may.wait()

    calls = asyncio.gather(call(), call())
    await asyncio.sleep(0)
    assert semaphore.taken == 0
    await semaphore.acquire("a")
    may.set()
    await asyncio.sleep(0.01)
    assert not calls.done()  # it waits for its slot
    semaphore.release("a")
    await calls
    assert (semaphore.taken, slot.held) == (1, True)


async def test_a_look_that_is_cut_short_during_a_call_holds_nothing() -> None:
    semaphore = FairSemaphore(1)
    slot = Slot(semaphore, "a")
    CURRENT_SLOT.set(slot)
    await slot.acquire()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), slot_released():
            await asyncio.Event().wait()
    slot.release()
    assert semaphore.taken == 0
