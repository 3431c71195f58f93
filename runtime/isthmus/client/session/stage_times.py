"""How long a client spends in each stage of its work."""

import time
from collections.abc import Callable

# The stages that an update's header tells of, by what a heartbeat calls them. How long a push takes is not known before
# it is over: the aggregator measures that.
TOLD = {"waiting": "wait", "pulling": "pull", "evaluating": "evaluate", "training": "train", "encoding": "encode"}


class Stages:
    """The present stage, and the seconds that each has taken since they were last asked for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.current = "waiting"
        self._clock = clock
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """The present stage ends here."""
        now = self._clock()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = stage, now

    def take(self) -> dict[str, float]:
        """Seconds by the names of :data:`TOLD`; what follows counts from zero."""
        self.enter(self.current)
        seconds, self._seconds = self._seconds, {}
        return {name: seconds[stage] for stage, name in TOLD.items() if stage in seconds}
