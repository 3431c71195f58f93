"""The operator's clock, which follows the API server's: its time is taken from the Date header of responses.

A node's own clock may be wrong by hours or be set while the operator runs, and deadlines must not depend on that.
Durations are measured with ``time.monotonic()`` everywhere else.
"""

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from ..metrics import CLOCK_SKEW

log = logging.getLogger(__name__)

# A Date has a resolution of one second, and responses take time: smaller differences are ignored. Seconds.
_TOLERANCE = 2.0
# The Date of a response that took longer is too inaccurate. Seconds.
_LONGEST_WAY = 10.0
_WORTH_A_WARNING = 60.0


class Clock:
    """A clock that runs on the monotonic clock between responses, independent of the node's wall clock."""

    def __init__(self, steady: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._steady = steady
        self._wall = wall
        self._lock = threading.Lock()
        self._offset: float | None = None  # API server's time minus monotonic time
        self._warned = False

    def now(self) -> dt.datetime:
        """Return the time in UTC; before the first response, the node's own."""
        offset = self._offset
        seconds = self._wall() if offset is None else self._steady() + offset
        return dt.datetime.fromtimestamp(seconds, dt.UTC)

    def observe_date(self, date: str | None, sent: float) -> None:
        """Adjust to a response's Date header. ``sent``: monotonic time of the request."""
        received = self._steady()
        if date is None or received - sent > _LONGEST_WAY:
            return
        try:
            moment = parsedate_to_datetime(date).timestamp()
        except ValueError:
            return
        # Assume that it was set halfway between request and response, in the middle of its second.
        reported = moment + 0.5 + (received - sent) / 2
        with self._lock:
            known = self._offset if self._offset is not None else self._wall() - received
            if abs(reported - (received + known)) > _TOLERANCE + (received - sent) / 2:
                known = reported - received
            self._offset = known
            skew = self._wall() - (received + known)
        CLOCK_SKEW.set(skew)
        if abs(skew) > _WORTH_A_WARNING and not self._warned:
            log.warning("node clock differs from the API server's by %+.0f s; using the API server's", skew)
        self._warned = abs(skew) > _WORTH_A_WARNING
