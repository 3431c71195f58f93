"""Time that a client spends in each stage of its work."""

import time
from collections.abc import Callable

# Names of the stages in an update's header, by their names in a heartbeat. The duration of a push is not known before
# the push is over: the aggregator measures it.
REPORTED_STAGES = {
    "waiting": "wait",
    "pulling": "pull",
    "evaluating": "evaluate",
    "training": "train",
    "encoding": "encode",
}


class StageTimer:
    """The current stage, and the seconds spent in each since the last :meth:`take`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.current = "waiting"
        self._clock = clock
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """End the current stage, and begin another."""
        now = self._clock()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = stage, now

    def take(self) -> dict[str, float]:
        """Return seconds by the names in :data:`REPORTED_STAGES`, and reset them."""
        self.enter(self.current)
        seconds, self._seconds = self._seconds, {}
        return {name: seconds[stage] for stage, name in REPORTED_STAGES.items() if stage in seconds}
