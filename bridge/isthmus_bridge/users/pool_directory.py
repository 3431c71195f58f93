"""The location of a pool's files: a directory of the bridge's own, or of the local user who owns the pool."""

from ..files.run_directory import RunDirectory
from ..policy.policy import Policy
from .directory import UserDirectory
from .helper_client import AsUser
from .sudoers import run_dir

PoolDirectory = RunDirectory | UserDirectory


def pool_directory(policy: Policy, key: str, user: str) -> PoolDirectory:
    """Return the directory of a pool. ``user``: its local user; empty for the user who runs the bridge.

    Raises ``OSError`` if the policy no longer has the settings of local users.
    """
    if not user:
        return RunDirectory(policy.run_dir, key)
    return UserDirectory(run_dir(policy, user), policy.run_dir, key, user, AsUser(policy))
