"""The operator's time: that of the API server, whose timestamps it compares with, told by the Date of its answers.

A node's own clock may be wrong by hours, or be set while the operator runs: no job may end before its time, or live
beyond it, because of that. What merely has to last a while is measured by ``time.monotonic()`` everywhere else.
"""

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from ..metrics import CLOCK_SKEW

log = logging.getLogger(__name__)

# A Date tells whole seconds, and answers take a while on their way: less than this is no difference.
_TOLERANCE = 2.0
# An answer that took longer says too little.
_LONGEST_WAY = 10.0
_WORTH_A_WARNING = 60.0


class Clock:
    """Runs on by itself between answers, whatever becomes of the node's clock."""

    def __init__(self, steady: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._steady = steady
        self._wall = wall
        self._lock = threading.Lock()
        self._offset: float | None = None  # between the API server's time and the steady one
        self._warned = False

    def now(self) -> dt.datetime:
        """The time (UTC); before the first answer, the node's own."""
        offset = self._offset
        seconds = self._wall() if offset is None else self._steady() + offset
        return dt.datetime.fromtimestamp(seconds, dt.UTC)

    def observe_date(self, date: str | None, sent: float) -> None:
        """Takes in an answer's Date header. ``sent``: the steady time at which it was asked for."""
        received = self._steady()
        if date is None or received - sent > _LONGEST_WAY:
            return
        try:
            moment = parsedate_to_datetime(date).timestamp()
        except ValueError:
            return
        # Of the moment halfway, in the middle of the second that it tells.
        told = moment + 0.5 + (received - sent) / 2
        with self._lock:
            known = self._offset if self._offset is not None else self._wall() - received
            if abs(told - (received + known)) > _TOLERANCE + (received - sent) / 2:
                known = told - received
            self._offset = known
            skew = self._wall() - (received + known)
        CLOCK_SKEW.set(skew)
        if abs(skew) > _WORTH_A_WARNING and not self._warned:
            log.warning("this node's clock is %+.0f s off the API server's, by whose time jobs are kept", skew)
        self._warned = abs(skew) > _WORTH_A_WARNING
