"""The local users that a policy names, and checks of these users on this machine."""

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path

from ..policy.policy import Policy, PolicyError


def local_users(policy: Policy) -> list[str]:
    """Return the local users of the policy, each once."""
    return list(dict.fromkeys(identity.user for identity in policy.identities if identity.user))


def fault(user: str) -> str:
    """Return why a user of this machine cannot own pools; empty if it can."""
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        return f"{user!r} is not a user of this machine"
    if uid == 0:
        return f"{user!r} is root (uid 0): jobs never run as root"
    if uid == os.getuid():
        return f"{user!r} is the user who runs the bridge: leave the field out"
    return ""


def faults(policy: Policy) -> Iterator[str]:
    """Yield why local users of the policy cannot be used on this machine, one line each."""
    first: dict[int, str] = {}
    for number, identity in enumerate(policy.identities):
        if not identity.user:
            continue
        if why := fault(identity.user):
            yield f"identities[{number}].user: {why}"
            continue
        # Slurm identifies the owner of a job by its uid alone.
        uid = pwd.getpwnam(identity.user).pw_uid
        if (other := first.setdefault(uid, identity.user)) != identity.user:
            yield f"identities[{number}].user: {identity.user!r} is the same user as {other!r} (uid {uid})"
    if not local_users(policy):
        return
    if policy.slurm.conf is None and "SLURM_CONF" in os.environ:
        yield "slurm.conf: name the file here: this environment's SLURM_CONF does not reach other users"
    if _no_new_privileges():
        yield (
            "users: this process may gain no privileges, so sudo cannot work: set NoNewPrivileges=no in the systemd"
            " unit, and use no container"
        )


def require(policy: Policy) -> Policy:
    """Return the policy. Raises :class:`PolicyError` if one of its local users cannot be used."""
    if found := list(faults(policy)):
        raise PolicyError("; ".join(found))
    return policy


def _no_new_privileges() -> bool:
    try:
        return re.search(r"^NoNewPrivs:\s*1$", Path("/proc/self/status").read_text(), re.MULTILINE) is not None
    except OSError:
        return False
