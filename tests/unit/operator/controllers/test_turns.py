"""Turns: fair between groups, and given up for calls to remote parties."""

import asyncio

import pytest

from isthmus_operator.turns import CURRENT, Turn, Turns, outside


async def granted(turns: Turns, group: str) -> bool:
    """Whether a turn is to be had at once."""
    task = asyncio.create_task(turns.acquire(group))
    await asyncio.sleep(0)
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def test_a_group_that_has_nothing_under_way_need_not_wait_for_the_others() -> None:
    turns = Turns(2)
    assert [await granted(turns, "busy") for _ in range(3)] == [True, True, False]
    assert await granted(turns, "other")
    assert not await granted(turns, "other")
    # Up to a bound.
    assert [await granted(turns, f"g{number}") for number in range(6)] == [True] * 5 + [False]


async def test_groups_take_turns_at_what_becomes_free() -> None:
    turns, order = Turns(1), []

    async def work(group: str) -> None:
        await turns.acquire(group)
        order.append(group)
        await asyncio.sleep(0)
        turns.release(group)

    for group in ("a", "b", "c"):
        await turns.acquire(group)
    tasks = [asyncio.create_task(work(group)) for group in ("a", "a", "a", "b", "c")]
    await asyncio.sleep(0)
    assert order == []
    for group in ("a", "b", "c"):
        turns.release(group)
    await asyncio.gather(*tasks)
    assert sorted(order) == ["a", "a", "a", "b", "c"]
    assert set(order[:3]) == {"a", "b", "c"}
    assert turns.taken == 0


async def test_one_that_was_waited_for_in_vain_is_not_lost() -> None:
    turns = Turns(1)
    await turns.acquire("a")
    waiting = asyncio.create_task(turns.acquire("a"))
    await asyncio.sleep(0)
    turns.release("a")
    waiting.cancel()  # at the moment when it is given
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert turns.taken == 0
    assert await granted(turns, "a")


async def test_a_remote_call_gives_the_turn_up_and_takes_it_again() -> None:
    turns, may = Turns(1), asyncio.Event()
    turn = Turn(turns, "a")
    CURRENT.set(turn)
    await turn.take()

    async def call() -> None:
        async with outside():
            await may.wait()

    calls = asyncio.gather(call(), call())
    await asyncio.sleep(0)
    assert turns.taken == 0
    await turns.acquire("a")
    may.set()
    await asyncio.sleep(0.01)
    assert not calls.done()  # it waits for its turn
    turns.release("a")
    await calls
    assert (turns.taken, turn.held) == (1, True)


async def test_a_look_that_is_cut_short_during_a_call_holds_nothing() -> None:
    turns = Turns(1)
    turn = Turn(turns, "a")
    CURRENT.set(turn)
    await turn.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), outside():
            await asyncio.Event().wait()
    turn.give_up()
    assert turns.taken == 0
