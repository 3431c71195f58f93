"""Record of a round, as committed with its model."""

import time
from collections.abc import Set

from ..clients.membership import ClientId
from ..state.confirmation import ClientMeasurements
from ..state.metrics_by_round import Progress
from ..state.round_sums import RoundSums
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
    if current.sums is not None:
        record = _of_sums(current, current.sums, progress)
    else:
        record = _of_updates(current, progress, measurements, present, robust=robust)
    if budget is not None:
        record.privacy = budget.account()
    return record


def _of_sums(current: ActiveRound, sums: RoundSums, progress: Progress) -> RoundRecord:
    # Single measurements are secret, so the mean takes the place of the value that most clients confirm.
    means = progress.admit({_train_name(name): value for name, value in sums.metrics.items()})
    record = _record(current, round(sums.examples), means)
    record.confirmed = {name: means[name] for name in (progress.objective.metric,) if name in means}
    record.secure = {"dropouts": sums.dropouts, "parties": sums.parties, "clipped_ratio": sums.clipped_ratio}
    return record


def _of_updates(
    current: ActiveRound, progress: Progress, measurements: ClientMeasurements, present: Set[ClientId], *, robust: bool
) -> RoundRecord:
    reported = current.training_means(robust=robust)
    means = progress.admit({_train_name(name): value for name, value in reported.means().items()})
    objective = progress.objective.metric
    names = [name for name in {objective, objective.removeprefix(_TRAIN_PREFIX)} if _train_name(name) == objective]
    asked = current.accepted | {client for client, _ in current.late}
    confirmed = measurements.confirmed(reported, names, means.get(objective), asked, present)
    record = _record(current, current.examples, means)
    record.confirmed = {} if confirmed is None else {objective: confirmed}
    return record


def _record(current: ActiveRound, examples: int, means: dict[str, float]) -> RoundRecord:
    seconds = time.monotonic() - current.started
    return RoundRecord(current.number, seconds, current.updates, examples, means, time.time())


def committed_record(checkpoint: Checkpoint | None) -> RoundRecord | None:
    """Return the record in a checkpoint; ``None`` if the checkpoint holds no round's result."""
    if checkpoint is None or not checkpoint.round:
        return None
    return RoundRecord.of_text(checkpoint.notes[RECORD])


def _train_name(name: str) -> str:
    return name if name.startswith(_TRAIN_PREFIX) else _TRAIN_PREFIX + name
