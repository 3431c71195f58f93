"""Termination of asyncio tasks."""

import asyncio
from collections.abc import Iterable
from typing import Any

# A task that has not ended after this time is cancelled again. Seconds.
_AGAIN = 2.0


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended; their exceptions are ignored.

    A task that continues is cancelled again: grpc.aio catches a cancellation while a stream begins
    (``StreamStreamCall._prepare_rpc``). If the peer closes the stream at the same moment, the reader only sees that,
    and a reader that reconnects would never end.
    """
    all_of_them = list(tasks)
    pending = {task for task in all_of_them if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN)
    await asyncio.gather(*all_of_them, return_exceptions=True)
