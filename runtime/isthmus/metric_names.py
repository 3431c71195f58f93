"""Names of metrics: how many a client may report, and what they may look like.

They become labels in Prometheus, entries of the job's status and of the checkpoints' headers. The client library checks
them where the script hands them over, and the aggregator where they come in.
"""

from collections.abc import Collection

from isthmus_contracts.text import one_line

MOST_METRICS = 256
"""In one report."""
LONGEST_NAME = 128
"""Characters."""


def problem_with(names: Collection[str]) -> str | None:
    """Return what is wrong with a report's names, in one line; ``None`` if nothing is."""
    if len(names) > MOST_METRICS:
        return f"{len(names)} metrics are too many: at most {MOST_METRICS} can be reported at a time"
    for name in names:
        if not name or not name.isprintable():
            return f"the metric name {one_line(repr(name), 60)} is not printable"
        if len(name) > LONGEST_NAME:
            return f"the metric name {one_line(name, 60)} has {len(name)} characters, more than {LONGEST_NAME}"
    return None
