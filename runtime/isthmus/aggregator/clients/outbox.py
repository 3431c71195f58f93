"""Bounded queue of messages for a client's control stream, since a client may never read them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from isthmus_contracts.pb import federation_pb2 as pb

MOST_MESSAGES = 64
"""A client with more unread messages than this is not reading: its stream is ended."""
# Of these messages only the newest is kept. An offer may hold a whole model.
_REPLACED = frozenset({"offer", "committed"})


class Outbox(asyncio.Queue["pb.ServerMessage | None"]):
    """A queue of messages; ``None`` ends the stream. A newer offer or commit replaces an unread one."""

    def _init(self, maxsize: int) -> None:
        self._messages: deque[pb.ServerMessage | None] = deque()
        self._queue = self._messages

    def _put(self, item: pb.ServerMessage | None) -> None:
        kind = None if item is None else item.WhichOneof("message")
        if kind in _REPLACED:
            for place, older in enumerate(self._messages):
                if older is not None and older.WhichOneof("message") == kind:
                    del self._messages[place]
                    break
        if len(self._messages) >= MOST_MESSAGES:
            self._messages.clear()
            item = None
        self._messages.append(item)


async def drain(outbox: "asyncio.Queue[pb.ServerMessage | None]") -> AsyncIterator[pb.ServerMessage]:
    """Yield messages until the stream ends.

    A commit that is directly followed by an offer to train is omitted: the offer implies it, since clients release
    their update for either.
    """
    message = await outbox.get()
    while message is not None:
        if not message.HasField("committed"):
            yield message
            message = await outbox.get()
            continue
        alone = outbox.empty()
        following = None if alone else outbox.get_nowait()
        if following is None or following.offer.kind != pb.Offer.TRAIN:
            yield message
        message = await outbox.get() if alone else following
