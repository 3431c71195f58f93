"""Durations of the stages of a round."""

import math
from collections.abc import Mapping
from threading import Lock

CLIENT_STAGES = ("wait", "pull", "evaluate", "train", "encode")
"""Stages that clients measure, each since its last update."""
SERVER_STAGES = ("push", "fold", "checkpoint")
"""Stages that the aggregator measures."""
# Longest plausible duration of a stage; above it the clock is wrong. Seconds.
_LONGEST = 30 * 86400.0


def sanitize(reported: Mapping[str, float]) -> dict[str, float]:
    """Return the plausible part of a client's measurements: known stages with finite, non-negative seconds."""
    known = {stage: reported[stage] for stage in CLIENT_STAGES if stage in reported}
    return {stage: value for stage, value in known.items() if math.isfinite(value) and 0 <= value <= _LONGEST}


class StageTimes:
    """Counts, sums and maxima of seconds by stage. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._tallies: dict[str, tuple[int, float, float]] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Add one measurement."""
        with self._lock:
            count, total, longest = self._tallies.get(stage, (0, 0.0, 0.0))
            self._tallies[stage] = (count + 1, total + seconds, max(longest, seconds))

    def summary(self) -> dict[str, dict[str, float]]:
        """Return mean and maximum of each stage, in seconds rounded to microseconds."""
        with self._lock:
            tallies = dict(self._tallies)
        return {
            stage: {"mean": round(total / count, 6), "max": round(longest, 6)}
            for stage, (count, total, longest) in tallies.items()
        }
