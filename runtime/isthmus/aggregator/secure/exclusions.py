"""Clients that a round of secure aggregation goes on without, and those among them that get another chance."""

from collections.abc import Collection

from ..clients.membership import ClientId


class Exclusions:
    """Clients of one round that have refused to go on, and culprits, which would spoil each instance.

    A client's refusal may depend on who takes part, so it gets another chance. A culprit gets none in this round, not
    even as a new process: the other clients count each further instance with it as a fault, and end after a few.
    """

    def __init__(self) -> None:
        self._refusers: set[ClientId] = set()
        self._culprits: set[ClientId] = set()

    def add(self, client: ClientId, *, culprit: bool) -> None:
        """Note a client that was dropped."""
        (self._culprits if culprit else self._refusers).add(client)

    def pardon(self, rejected: set[ClientId], only: Collection[ClientId] | None = None) -> None:
        """Take clients that have refused out of ``rejected``: all of them, or only those given."""
        pardoned = self._refusers if only is None else self._refusers.intersection(only)
        rejected -= pardoned - self._culprits
        self._refusers = self._refusers - pardoned

    def pardon_all(self, rejected: set[ClientId]) -> None:
        """Take all clients out of ``rejected`` that are no culprits, whatever they were rejected for."""
        rejected &= self._culprits
        self._refusers.clear()

    def clear(self) -> None:
        """Forget all clients: the round is over."""
        self._refusers.clear()
        self._culprits.clear()
