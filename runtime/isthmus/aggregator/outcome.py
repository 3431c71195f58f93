"""What a round comes to, as the record that is committed with its model."""

import time

from .budget import PrivacyBudget
from .checkpoints import Checkpoint, RoundRecord
from .course import Course
from .decisions import RoundState
from .progress import Progress

RECORD = "record"
"""The name of the record among a checkpoint's notes."""
_TRAIN_PREFIX = "train_"


def record_of(state: RoundState, course: Course, progress: Progress, budget: PrivacyBudget | None) -> RoundRecord:
    """Return the record of a round whose result is made."""
    means = progress.admit({_train_name(name): value for name, value in course.training.means().items()})
    seconds = time.monotonic() - state.started
    record = RoundRecord(state.number, seconds, state.updates, course.examples, means, time.time())
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
