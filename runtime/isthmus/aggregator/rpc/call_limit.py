"""Limit on the concurrent calls of a client: a newer call ends the oldest."""

import asyncio
from collections.abc import Awaitable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class SupersededError(Exception):
    """A newer call of the same client has ended this one."""


class CallLimit:
    """Calls in progress, by client."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, dict[asyncio.Task[Any], None]] = {}  # oldest first

    async def run(self, client: Hashable, work: Awaitable[T], most: int = 1) -> T:
        """Await ``work`` as one of at most ``most`` calls of a client; cancel its oldest call if there are more.

        Raises:
            SupersededError: a newer call has ended this one.
        """
        tasks = self._tasks.setdefault(client, {})
        task = asyncio.ensure_future(work)
        if len(tasks) >= most:
            oldest = next(iter(tasks))
            del tasks[oldest]
            oldest.cancel()
        tasks[task] = None
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled() and task not in tasks:
                raise SupersededError("a newer call of this client has taken its place") from None
            raise
        finally:
            tasks.pop(task, None)
            if not tasks and self._tasks.get(client) is tasks:
                del self._tasks[client]
