"""Numbers of the instances of secure aggregation, which grow over the whole life of a job."""

import time
from collections.abc import Callable
from pathlib import Path

from isthmus_contracts.process import files

# Numbers that one write reserves, so that short rounds cost no fsync each. Nanoseconds.
_RESERVED = 600 * 10**9


class Incarnations:
    """Counter whose numbers strictly increase, also over restarts and when the clock is set back.

    Clients refuse an instance whose number is not above all that they have seen. So a number must never be used twice.
    The file holds a bound of all numbers that may have been used.
    """

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """``path``: of the file, whose directory must exist. ``clock``: returns nanoseconds since the epoch."""
        self._path = path
        self._clock = clock
        self._last = self._bound = _read(path)

    def next(self) -> int:
        """Return the next number, after it is durable that it may be used. Raise ``OSError``."""
        number = max(self._clock(), self._last + 1)
        if number > self._bound:
            bound = number + _RESERVED
            files.replace(self._path, f"{bound}\n".encode(), sync=True)
            self._bound = bound
        self._last = number
        return number


def _read(path: Path) -> int:
    """Return the bound in the file; 0 without a readable one: then only the clock counts. Raise ``OSError``."""
    try:
        return int(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return 0
