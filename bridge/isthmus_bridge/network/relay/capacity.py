"""Limits on the relay's connections, so that descriptors stay free for Slurm's programs and for callers."""

import resource

BACKLOG = 256
"""Connections that asyncio accepts at once, before any can be refused."""
# Descriptors for these and for the rest of the bridge: callers, the journal, pipes to Slurm's programs.
_OTHERS = 384 + BACKLOG
_EACH = 2
# At most this fraction (1/4) of the connections may not have named a server yet: anyone can open such connections.
_UNNAMED_SHARE = 4


def reserve_files(connections: int) -> int:
    """Raise the limit of open files as far as needed for ``connections``; return how many of them fit.

    It is not raised further, because Slurm passes the limit on to jobs (PropagateResourceLimits).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    wanted = _OTHERS + _EACH * connections
    reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < reachable:
        soft = reachable
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(connections, (soft - _OTHERS) // _EACH))


def max_unnamed(connections: int) -> int:
    """Return how many of the connections may not have named a server yet."""
    return max(1, connections // _UNNAMED_SHARE)
