"""Rate limit of log lines of one kind: callers can cause many, and the log is on a disk."""

import logging
import threading
import time

BURST = 1000
"""Lines of one kind at once."""
PER_SECOND = 1.0
"""Further lines of one kind per second."""
_MOST_KINDS = 1000


class LogLimit(logging.Filter):
    """Filter that limits the rate of lines of one kind, and reports the number of suppressed lines.

    Lines of one kind have the same logger, level and format. Errors are limited too: a peer that can cause an error
    would otherwise fill the log with traces.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        # By kind: remaining lines, start of the interval, number of suppressed lines.
        self._kinds: dict[tuple[str, int, str], tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if a record may pass; add the number of suppressed lines before it."""
        kind, now = (record.name, record.levelno, str(record.msg)), time.monotonic()
        with self._lock:
            if len(self._kinds) >= _MOST_KINDS:  # from a library that formats its messages itself
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
    """Add the limit to every handler of the root logger."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(LogLimit())
