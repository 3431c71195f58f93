"""A bound on how fast lines of one kind come into a log: callers cause many of them, and the log is on a disk."""

import logging
import threading
import time

BURST = 1000
"""Lines of one kind at once."""
PER_SECOND = 1.0
"""Lines of one kind a second after those."""
_MOST_KINDS = 1000


class LogLimit(logging.Filter):
    """Lets through so many lines of one kind, and with the next one the number of those left out.

    Of one kind are lines from one statement: of one logger, level and format. Errors are no exception: a peer that has
    found a way to cause one would fill the log with traces.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        # By kind: lines that may still come, since when, and how many were left out.
        self._kinds: dict[tuple[str, int, str], tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record may pass; it says how many before it did not."""
        kind, now = (record.name, record.levelno, str(record.msg)), time.monotonic()
        with self._lock:
            if len(self._kinds) >= _MOST_KINDS:  # a library that formats its texts itself
                self._kinds.clear()
            left, since, out = self._kinds.get(kind, (float(BURST), now, 0))
            left = min(float(BURST), left + (now - since) * PER_SECOND)
            if left < 1:
                self._kinds[kind] = (left, now, out + 1)
                return False
            self._kinds[kind] = (left - 1, now, 0)
        if out:
            record.msg, record.args = f"{record.getMessage()} ({out} more like it were left out)", ()
        return True


def limit_root() -> None:
    """Put the limit on every handler of the root logger."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(LogLimit())
