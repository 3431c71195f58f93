"""Limit of open files: untrusted connections must leave enough for the program's own work."""

import resource

# Reserved for checkpoints, logs, pipes and libraries.
_OWN = 256


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it. Not for programs whose children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connections_within(files: int, wanted: int) -> int:
    """Return the number of connections, at most ``wanted``, that fit in the limit beside the program's files."""
    return max(1, min(wanted, max(files - _OWN, files // 2)))
