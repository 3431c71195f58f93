"""Circuit breaker: after several failures in a row, a remote party is called only occasionally.

Without it, each job would wait for its own deadline to learn that its site is down.
"""

import time
from collections.abc import Callable

FAILURES = 3
"""The number of failures in a row that opens the breaker."""
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 60.0


class CircuitBreaker:
    """The breaker of one party. Closed: calls pass. Open: none passes. Half-open, after a pause: one call passes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._retry_at = 0.0
        self._probing = False
        self.last_error = ""
        """The message of the last failure."""

    @property
    def is_open(self) -> bool:
        """True from ``FAILURES`` failures in a row until a call succeeds."""
        return self._failures >= FAILURES

    @property
    def overdue(self) -> float:
        """The seconds since a call may be tried again, without one having been made."""
        return max(0.0, self._clock() - self._retry_at) if self.is_open and not self._probing else 0.0

    def admits(self) -> bool:
        """Return True if a call may be made, whose end is then reported by one of the three methods below."""
        if not self.is_open:
            return True
        if self._probing or self._clock() < self._retry_at:
            return False
        self._probing = True
        return True

    def succeeded(self) -> bool:
        """Report a response. Return True if it closed the breaker."""
        closed = self.is_open
        self._failures, self._pause, self._retry_at, self._probing, self.last_error = 0, FIRST_PAUSE, 0.0, False, ""
        return closed

    def failed(self, words: str) -> bool:
        """Report a failure. Return True if it opened the breaker."""
        before, now = self.is_open, self._clock()
        self._failures += 1
        self.last_error = words
        if self.is_open and (not before or self._probing):
            self._retry_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._probing = False
        return self.is_open and not before

    def abandoned(self) -> None:
        """Report a call that ended without information about the party."""
        self._probing = False

    def seconds_left(self) -> float:
        """Return the seconds until a call may be tried."""
        return max(0.0, self._retry_at - self._clock())
