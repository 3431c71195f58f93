"""Record of a round, as committed with its model."""

import time
from collections.abc import Set

from ..clients.membership import ClientId
from ..state.confirmation import ClientMeasurements
from ..state.metrics_by_round import Progress
from ..state.training_state import ActiveRound
from ..storage.checkpoints import Checkpoint
from ..storage.round_record import RoundRecord
from .privacy_budget import PrivacyBudget

RECORD = "record"
"""Name of the record among a checkpoint's notes."""
_TRAIN_PREFIX = "train_"


def record_of(
    current: ActiveRound, progress: Progress, budget: PrivacyBudget | None, measurements: ClientMeasurements,
    present: Set[ClientId], *, robust: bool,
) -> RoundRecord:  # fmt: skip
    """Return the record of a round whose result is computed.

    ``present``: the clients that can train. ``robust``: medians of the training metrics, not means weighted by
    examples.
    """
    seconds = time.monotonic() - current.started
    if (sums := current.sums) is not None:
        # Single measurements are secret, so the mean takes the place of the value that most clients confirm.
        means = progress.admit({_train_name(name): value for name, value in sums.metrics.items()})
        record = RoundRecord(current.number, seconds, current.updates, round(sums.examples), means, time.time())
        record.confirmed = {name: means[name] for name in (progress.objective.metric,) if name in means}
        record.secure = {
            "dropouts": sums.dropouts, "parties": sums.parties, "clipped_ratio": sums.clipped_ratio,
        }  # fmt: skip
        if budget is not None:
            record.privacy = budget.account()
        return record
    reported = current.training_means(robust=robust)
    means = progress.admit({_train_name(name): value for name, value in reported.means().items()})
    record = RoundRecord(current.number, seconds, current.updates, current.examples, means, time.time())
    objective = progress.objective.metric
    names = [name for name in {objective, objective.removeprefix(_TRAIN_PREFIX)} if _train_name(name) == objective]
    asked = current.accepted | {client for client, _ in current.late}
    confirmed = measurements.confirmed(reported, names, means.get(objective), asked, present)
    record.confirmed = {} if confirmed is None else {objective: confirmed}
    if budget is not None:
        record.privacy = budget.account()
    return record


def committed_record(checkpoint: Checkpoint | None) -> RoundRecord | None:
    """Return the record in a checkpoint; ``None`` if the checkpoint holds no round's result."""
    if checkpoint is None or not checkpoint.round:
        return None
    return RoundRecord.of_text(checkpoint.notes[RECORD])


def _train_name(name: str) -> str:
    return name if name.startswith(_TRAIN_PREFIX) else _TRAIN_PREFIX + name
