"""Tasks of asyncio that are to end."""

import asyncio
from collections.abc import Iterable
from typing import Any

# Who cleans up for longer than this is disturbed in it. Seconds.
_AGAIN = 2.0


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks, and waits until they are over; what they raise stays theirs.

    Who goes on is cancelled again: grpc.aio catches a cancellation that comes while a stream begins
    (``StreamStreamCall._prepare_rpc``), and where the other end breaks the stream off in the same moment, that is all
    that its reader hears. One that dials again then goes on for ever.
    """
    all_of_them = list(tasks)
    pending = {task for task in all_of_them if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN)
    await asyncio.gather(*all_of_them, return_exceptions=True)
