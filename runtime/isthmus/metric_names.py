"""Limits on the number and the names of the metrics that a client may report.

Names become labels in Prometheus, and entries of the job's status and of the checkpoints' headers. The client library
checks them when the script passes them, and the aggregator when it receives them.
"""

from collections.abc import Collection

from isthmus_contracts.text import one_line

MAX_METRICS = 256
"""Maximum number of metrics in one report."""
MAX_NAME_LENGTH = 128
"""Maximum length of a name in characters."""


def problem_with(names: Collection[str]) -> str | None:
    """Return the problem with a report's names, in one line, or ``None``."""
    if len(names) > MAX_METRICS:
        return f"{len(names)} metrics are too many: at most {MAX_METRICS} can be reported at a time"
    for name in names:
        if not name or not name.isprintable():
            return f"the metric name {one_line(repr(name), 60)} is not printable"
        if len(name) > MAX_NAME_LENGTH:
            return f"the metric name {one_line(name, 60)} has {len(name)} characters, more than {MAX_NAME_LENGTH}"
    return None
