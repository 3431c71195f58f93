"""Finished updates that a client keeps until it hears that they are part of a committed model."""

from collections.abc import Callable
from dataclasses import dataclass

from isthmus_contracts.pb import federation_pb2 as pb

from .transfer import FinishedUpdate

# One that came late and one of the round in progress, where late ones count at all; their memory is a model's each.
_AT_MOST = 2


@dataclass(eq=False)
class _Held:
    update: FinishedUpdate
    counts_in: int | None = None
    """The round that it counts in, once the aggregator has said so."""
    accepted_by: str = ""
    """The aggregator's process that did."""
    folds_late: bool = False
    """Where it can also count after its own round."""


class HeldUpdates:
    """In the order in which they were made. An aggregator that was killed asks for them again.

    ``dropped`` is told of each that is not needed any more.
    """

    def __init__(self, dropped: Callable[[FinishedUpdate], None]) -> None:
        self._held: list[_Held] = []
        self._dropped = dropped

    def keep(self, update: FinishedUpdate, *, folds_late: bool) -> None:
        """Takes in a new one."""
        self._held.append(_Held(update, folds_late=folds_late))
        self._keep_only(self._held[-_AT_MOST:])

    def _keep_only(self, kept: list[_Held]) -> None:
        gone = [held for held in self._held if held not in kept]
        self._held = kept
        for held in gone:
            self._dropped(held.update)

    def answered(self, update: FinishedUpdate, reply: pb.PushReply) -> None:
        """Heeds the aggregator's answer: what it will never count is not kept."""
        for held in self._held:
            if held.update is update and reply.verdict == pb.PushReply.ACCEPTED:
                held.counts_in, held.accepted_by = reply.round or update.round, reply.instance
        if reply.verdict in (pb.PushReply.INVALID, pb.PushReply.FENCED):
            self._keep_only([held for held in self._held if held.update is not update])

    def committed(self, round_number: int, instance: str) -> None:
        """Lets go of what is part of a committed model, or can never be. ``instance``: the aggregator's process.

        One that was killed may have accepted an update for a round that the next one committed without it.
        """

        def over(held: _Held) -> bool:
            if held.counts_in is None or held.accepted_by != instance:
                return not held.folds_late and held.update.round <= round_number
            return held.counts_in <= round_number

        self._keep_only([held for held in self._held if not over(held)])

    def asked(self, offer: pb.Offer) -> list[FinishedUpdate]:
        """What to send, again or at last, before an offer is taken up."""
        return [held.update for held in self._held if offer.folds_late or _answers(held.update, offer)]

    def answer(self, offer: pb.Offer) -> bool:
        """Whether the work that an offer asks for is done."""
        return any(_answers(held.update, offer) for held in self._held)

    def begin(self, offer: pb.Offer) -> None:
        """New work begins: where late updates do not count, older ones never will."""
        if not offer.folds_late:
            self._keep_only([])


def _answers(update: FinishedUpdate, offer: pb.Offer) -> bool:
    return (update.round, update.base_digest) == (offer.round, offer.base_digest)
