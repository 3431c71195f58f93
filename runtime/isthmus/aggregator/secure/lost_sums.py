"""Consequences of a sum that was lost after its survivors had been fixed, so that clients may have agreed to open it.

The updates in that sum must not be in another one, whose difference from the first would be one client's update.
"""

from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from ...secure_aggregation.parameters import MOST_ATTEMPTS
from ...strategies import StrategyError
from .journal import Entry


def consequence(entry: Entry) -> str:
    """Return why a sum was lost and what follows from it, in one line. Raise what :func:`require_possible` raises.

    ``entry``: of the journal, after the loss.
    """
    require_possible(entry)
    if entry.purpose == sa.SecureBegin.EVALUATE:
        return f"its sum was lost after the clients had agreed to open it ({entry.reason}), and they open only one"
    return f"round {entry.round} is done again: {entry.reason}; the clients train it again"


def require_possible(entry: Entry) -> None:
    """Raise :class:`StrategyError` if the sum of a round was lost so often that its clients refuse another one."""
    if entry.purpose == sa.SecureBegin.TRAIN and entry.attempt > MOST_ATTEMPTS:
        raise StrategyError(
            f"round {entry.round} cannot be done again: its sum was lost twice after the clients had agreed to open it"
            f" (the last time: {entry.reason}), and they refuse a third one, from which single updates could be"
            " learned; look at the clients that the aggregator's log names, and start a new job from the model of"
            f" round {entry.round - 1}"
        )
