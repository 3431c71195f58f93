"""Which client is asked for the first weights, and how long it may take. Times are monotonic seconds."""

from collections.abc import Sequence

from .membership import Client, ClientId

# A client that is connected has its weights in memory: one that has not begun to send them by then is passed over.
SILENCE_SECONDS = 60.0


class Initialization:
    """Asks one client after the other, until the weights of one are taken.

    Who was asked may still answer later: the first good weights count. When everybody has been asked in vain it starts
    over.
    """

    def __init__(self) -> None:
        self._current: ClientId | None = None
        self._asked: set[ClientId] = set()
        self._passed: set[tuple[ClientId, str]] = set()  # with the process that was asked
        self._deadline = 0.0
        self.until = 0.0
        """When to look again at the latest."""

    def choose(self, ready: Sequence[Client], now: float, seconds: float) -> Client | None:
        """Return whom to ask now; ``None`` while somebody is at it, or nobody is there.

        ``seconds``: how long one that has begun to send may take.
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
        """Return whether the client was asked, and may answer."""
        return client in self._asked

    def begun(self, client: ClientId) -> None:
        """The client has begun to send: it may take as long as a round."""
        if client == self._current:
            self.until = self._deadline

    def refused(self, client: ClientId) -> None:
        """The client's weights are of no use: the next one is asked."""
        if client == self._current:
            self._current = None
