"""Finished updates that a client keeps until they are part of a committed model."""

from collections.abc import Callable
from dataclasses import dataclass

from isthmus_contracts.pb import federation_pb2 as pb

from .transfer import FinishedUpdate

# A late one and one of the round in progress, where late updates count. Each takes the memory of a model.
_MAX_KEPT = 2


@dataclass(eq=False)
class _Pending:
    update: FinishedUpdate
    counts_in: int | None = None
    """The round in which it counts, once the aggregator has accepted it."""
    accepted_by: str = ""
    """Id of the aggregator's process that accepted it."""
    folds_late: bool = False
    """True if it can also count after its own round."""


class PendingUpdates:
    """Updates in the order in which they were made. A restarted aggregator asks for them again.

    ``dropped`` is called with each update that is no longer needed.
    """

    def __init__(self, on_dropped: Callable[[FinishedUpdate], None]) -> None:
        self._pending: list[_Pending] = []
        self._on_dropped = on_dropped

    def keep(self, update: FinishedUpdate, *, folds_late: bool) -> None:
        """Add a new update."""
        self._pending.append(_Pending(update, folds_late=folds_late))
        self._keep_only(self._pending[-_MAX_KEPT:])

    def _keep_only(self, kept: list[_Pending]) -> None:
        dropped = [pending for pending in self._pending if pending not in kept]
        self._pending = kept
        for pending in dropped:
            self._on_dropped(pending.update)

    def on_reply(self, update: FinishedUpdate, reply: pb.PushReply) -> None:
        """Handle the aggregator's reply: an update that it will never count is dropped."""
        for pending in self._pending:
            if pending.update is update and reply.verdict == pb.PushReply.ACCEPTED:
                pending.counts_in, pending.accepted_by = reply.round or update.round, reply.instance
        if reply.verdict in (pb.PushReply.INVALID, pb.PushReply.FENCED):
            self._keep_only([pending for pending in self._pending if pending.update is not update])

    def on_commit(self, round_number: int, instance: str) -> None:
        """Drop updates that are part of a committed model, or can never be part of one.

        ``instance``: id of the aggregator's process. A process that was killed may have accepted an update for a round
        that the next process committed without it.
        """

        def is_over(pending: _Pending) -> bool:
            if pending.counts_in is None or pending.accepted_by != instance:
                return not pending.folds_late and pending.update.round <= round_number
            return pending.counts_in <= round_number

        self._keep_only([pending for pending in self._pending if not is_over(pending)])

    def due(self, offer: pb.Offer) -> list[FinishedUpdate]:
        """Return the updates to send, or to resend, before an offer is carried out."""
        return [
            pending.update for pending in self._pending if offer.folds_late or _answers(pending.update, offer)
        ]  # fmt: skip

    def has_answer(self, offer: pb.Offer) -> bool:
        """Return whether the update that an offer asks for is already there."""
        return any(_answers(pending.update, offer) for pending in self._pending)

    def begin(self, offer: pb.Offer) -> None:
        """Begin a new round: if late updates do not count, drop the older ones."""
        if not offer.folds_late:
            self._keep_only([])


def _answers(update: FinishedUpdate, offer: pb.Offer) -> bool:
    if (update.round, update.base_digest) != (offer.round, offer.base_digest):
        return False
    return update.secure_attempt == (offer.secure_attempt if offer.secure else None)
