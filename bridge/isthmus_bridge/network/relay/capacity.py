"""How many connections the relay may hold: the bridge keeps descriptors for Slurm's commands and for its callers."""

import resource

BACKLOG = 256
"""Connections that asyncio takes at one go, before any can be refused."""
# Besides those, everything but the relay: callers, the journal, pipes to Slurm's commands.
_OTHERS = 384 + BACKLOG
_EACH = 2
# Of connections that have not said yet where they go: anybody can open those.
_UNNAMED_SHARE = 4


def reserve_files(connections: int) -> int:
    """Raises the limit of open files as far as so many need it, and returns how many there is room for.

    Not further: Slurm hands the limit on to jobs (PropagateResourceLimits).
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
    """How many of them may be without a name."""
    return max(1, connections // _UNNAMED_SHARE)
