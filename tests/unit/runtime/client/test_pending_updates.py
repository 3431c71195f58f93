"""Finished updates, and how long a client keeps them."""

import pytest

from isthmus.client.session.pending_updates import PendingUpdates
from isthmus.client.session.transfer import FinishedUpdate
from isthmus_contracts.pb import federation_pb2 as pb


def finished(round_number: int) -> FinishedUpdate:
    return FinishedUpdate(round_number, f"model {round_number - 1}", 1, {}, {})


def accepted(round_number: int, instance: str) -> pb.PushReply:
    return pb.PushReply(verdict=pb.PushReply.ACCEPTED, round=round_number, instance=instance)


@pytest.mark.parametrize("folds_late", [True, False])
def test_an_update_goes_with_the_commit_of_the_round_that_it_counts_in(folds_late: bool) -> None:
    gone: list[FinishedUpdate] = []
    pending, update = PendingUpdates(gone.append), finished(3)
    pending.keep(update, folds_late=folds_late)
    pending.on_reply(update, accepted(3, "first"))
    pending.on_commit(2, "first")
    assert not gone
    pending.on_commit(3, "first")
    assert gone == [update]


def test_an_aggregator_that_did_not_accept_it_does_not_commit_it() -> None:
    gone: list[FinishedUpdate] = []
    pending, update = PendingUpdates(gone.append), finished(3)
    pending.keep(update, folds_late=True)
    pending.on_reply(update, accepted(4, "first"))
    pending.on_commit(4, "second")  # the first process was killed before its commit
    assert not gone
    offer = pb.Offer(kind=pb.Offer.TRAIN, round=5, base_digest="model 4", folds_late=True)
    assert pending.due(offer) == [update]
    pending.on_reply(update, accepted(5, "second"))
    pending.on_commit(5, "second")
    assert gone == [update]


def test_an_update_is_released_where_late_ones_do_not_count() -> None:
    gone: list[FinishedUpdate] = []
    pending, update = PendingUpdates(gone.append), finished(3)
    pending.keep(update, folds_late=False)
    pending.on_reply(update, accepted(3, "first"))
    pending.on_commit(3, "second")
    assert gone == [update]
