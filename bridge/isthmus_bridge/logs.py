"""Logging: JSON lines, or text at a terminal. Lines about a pool carry its key."""

import json
import logging
import sys
import time

from isthmus_contracts.process.log_limit import limit_root

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "taskName", "asctime"}


class JsonFormatter(logging.Formatter):
    """Formatter of one JSON object per line: time, level, message, then the fields of the call's ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        line = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= _extra(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Formatter for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        fields = " ".join(f"{name}={value}" for name, value in _extra(record).items())
        line = f"{_time(record)} {record.levelname:<7} {record.getMessage()}"
        line = f"{line}  {fields}" if fields else line
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(level: str = "info") -> None:
    """Log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    limit_root()


def _extra(record: logging.LogRecord) -> dict[str, str]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"
