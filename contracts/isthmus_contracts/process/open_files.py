"""The limit of open files: connections of strangers must leave some for the program's own work."""

import resource

# For checkpoints, logs, pipes and libraries.
_OWN = 256


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it. Not for programs whose children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connections_within(files: int, wanted: int) -> int:
    """Return how many of the wanted connections a limit of open files has room for, beside the program's own files."""
    return max(1, min(wanted, max(files - _OWN, files // 2)))
