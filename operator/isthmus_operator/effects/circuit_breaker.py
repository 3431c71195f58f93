"""Circuit breakers: a party that did not answer several times in a row is left alone, but for one call now and then.

Without them each job would find out for itself, at the price of a deadline each time, that its site is dead.
"""

import time
from collections.abc import Callable

FAILURES = 3
"""In a row: more, and nobody else waits for it."""
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 60.0


class CircuitBreaker:
    """One party's. Closed: calls go through. Open: none does. Half-open, once its pause is over: one does."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._retry_at = 0.0
        self._probing = False
        self.last_error = ""
        """What the newest failure was."""

    @property
    def is_open(self) -> bool:
        """True from so many failures in a row until a call succeeds."""
        return self._failures >= FAILURES

    @property
    def overdue(self) -> float:
        """For how many seconds a call might have tried it, and none did."""
        return max(0.0, self._clock() - self._retry_at) if self.is_open and not self._probing else 0.0

    def admits(self) -> bool:
        """Whether a call may be made; it must end in one of the three below."""
        if not self.is_open:
            return True
        if self._probing or self._clock() < self._retry_at:
            return False
        self._probing = True
        return True

    def succeeded(self) -> bool:
        """It answered. Returns whether that closed the breaker."""
        closed = self.is_open
        self._failures, self._pause, self._retry_at, self._probing, self.last_error = 0, FIRST_PAUSE, 0.0, False, ""
        return closed

    def failed(self, words: str) -> bool:
        """It did not answer. Returns whether that opened the breaker."""
        before, now = self.is_open, self._clock()
        self._failures += 1
        self.last_error = words
        if self.is_open and (not before or self._probing):
            self._retry_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._probing = False
        return self.is_open and not before

    def abandoned(self) -> None:
        """The call ended without telling anything of the party."""
        self._probing = False

    def seconds_left(self) -> float:
        """Seconds until a call may try it."""
        return max(0.0, self._retry_at - self._clock())
