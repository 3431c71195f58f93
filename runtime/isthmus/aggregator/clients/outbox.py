"""Messages that wait for a client's control stream: few, since a client may never read them."""

import asyncio
from collections import deque

from isthmus_contracts.pb import federation_pb2 as pb

MOST_MESSAGES = 64
"""With more than these the client does not read: its stream is ended."""
# Of these only the newest counts. An offer may hold a whole model.
_REPLACED = frozenset({"offer", "committed"})


class Outbox(asyncio.Queue["pb.ServerMessage | None"]):
    """A queue of messages; ``None`` ends the stream. A newer offer or commit takes the place of one that waits."""

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
