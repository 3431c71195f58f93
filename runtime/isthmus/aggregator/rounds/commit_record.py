"""What a round comes to, as the record that is committed with its model."""

import time
from collections.abc import Set

from ..clients.membership import ClientId
from ..state.confirmation import ClientMeasurements
from ..state.metrics_by_round import Progress
from ..state.round_decision import RoundState
from ..state.training_state import TrainingState
from ..storage.checkpoints import Checkpoint, RoundRecord
from .privacy_budget import PrivacyBudget

RECORD = "record"
"""The name of the record among a checkpoint's notes."""
_TRAIN_PREFIX = "train_"


def record_of(
    state: RoundState, training: TrainingState, progress: Progress, budget: PrivacyBudget | None,
    measurements: ClientMeasurements, present: Set[ClientId],
) -> RoundRecord:  # fmt: skip
    """Return the record of a round whose result is made. ``present``: the clients that can train."""
    means = progress.admit({_train_name(name): value for name, value in training.means.means().items()})
    seconds = time.monotonic() - state.started
    record = RoundRecord(state.number, seconds, state.updates, training.examples, means, time.time())
    objective = progress.objective.metric
    names = [name for name in {objective, objective.removeprefix(_TRAIN_PREFIX)} if _train_name(name) == objective]
    asked = state.accepted | {client for client, _ in state.late}
    least = measurements.confirmed(training.means, names, means.get(objective), asked, present)
    record.confirmed = {} if least is None else {objective: least}
    if budget is not None:
        record.privacy = budget.account()
    return record


def committed_record(checkpoint: Checkpoint | None) -> RoundRecord | None:
    """Return the record in a checkpoint; ``None`` where it holds no round's result."""
    if checkpoint is None or not checkpoint.round:
        return None
    return RoundRecord.of_text(checkpoint.notes.get(RECORD, RoundRecord(checkpoint.round, 0.0, 0, 0).text()))


def _train_name(name: str) -> str:
    return name if name.startswith(_TRAIN_PREFIX) else _TRAIN_PREFIX + name
