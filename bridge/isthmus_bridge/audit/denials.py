"""A limit on recorded denials: callers repeat denied requests, and must not fill the site's disk with them."""

from collections import OrderedDict
from collections.abc import Hashable

# The same denial is recorded once in this time. Seconds.
_SAME_SECONDS = 3600.0
_REMEMBERED = 1024
# Different denials that are recorded at once, and per second in the long run.
_BURST = 100.0
_RATE = 0.1


class DenialLimit:
    """Decisions which denials are recorded. Not thread-safe."""

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, float] = OrderedDict()
        self._budget = _BURST
        self._last = 0.0
        self._omitted = 0

    def admit(self, denial: Hashable, now: float) -> int | None:
        """Return how many denials were omitted since the last recorded one; ``None`` if this one is omitted, too.

        ``now``: seconds of a clock that is never set back.
        """
        self._budget = min(_BURST, self._budget + max(0.0, now - self._last) * _RATE)
        self._last = now
        before = self._recorded.get(denial)
        if (before is not None and now < before + _SAME_SECONDS) or self._budget < 1:
            self._omitted += 1
            return None
        self._budget -= 1
        self._recorded[denial] = now
        self._recorded.move_to_end(denial)
        if len(self._recorded) > _REMEMBERED:
            self._recorded.popitem(last=False)
        omitted, self._omitted = self._omitted, 0
        return omitted
