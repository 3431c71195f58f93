"""Selection of the client that sends the initial weights. Times are monotonic seconds."""

from collections.abc import Sequence

from .membership import Client, ClientId

# A connected client has its weights in memory. If it has not begun to send them within this time, another is asked.
SILENCE_SECONDS = 60.0


class Initialization:
    """Sequence of clients that are asked, one after the other, until the weights of one are accepted.

    Every client that was asked may still answer later: the first valid weights count. When all clients have been asked
    without success, the selection starts over.
    """

    def __init__(self) -> None:
        self._current: ClientId | None = None
        self._asked: set[ClientId] = set()
        self._passed: set[tuple[ClientId, str]] = set()  # client and instance
        self._deadline = 0.0
        self.until = 0.0
        """Latest time of the next call of :meth:`choose`."""

    def choose(self, ready: Sequence[Client], now: float, seconds: float) -> Client | None:
        """Return the client to ask now; ``None`` while a client is sending, or if no client is connected.

        ``seconds``: the longest time for sending, once a client has begun.
        """
        present = any(client.id == self._current for client in ready)
        if present and now < self.until:
            return None
        candidates = [client for client in ready if (client.id, client.instance) not in self._passed]
        if not candidates:
            if now < self.until:
                return None
            self._passed.clear()
            candidates = list(ready)
        if not candidates:
            self.until = now + SILENCE_SECONDS
            return None
        chosen = candidates[0]
        self._current, self._deadline = chosen.id, now + seconds
        self._asked.add(chosen.id)
        self._passed.add((chosen.id, chosen.instance))
        self.until = now + min(SILENCE_SECONDS, seconds)
        return chosen

    def asked(self, client: ClientId) -> bool:
        """Return whether the client was asked, and may therefore answer."""
        return client in self._asked

    def begun(self, client: ClientId) -> None:
        """Note that the client has begun to send; extend its time to the deadline of a round."""
        if client == self._current:
            self.until = self._deadline

    def refused(self, client: ClientId) -> None:
        """Note that the client's weights are invalid, so that the next client is asked."""
        if client == self._current:
            self._current = None
