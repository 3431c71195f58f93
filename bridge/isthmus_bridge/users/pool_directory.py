"""Where a pool's files lie: in a directory of the bridge's own, or in one of the local user whose pool it is."""

from ..files.run_directory import RunDirectory
from ..policy.policy import Policy
from .directory import UserDirectory
from .helper_client import AsUser
from .sudoers import run_dir

PoolDirectory = RunDirectory | UserDirectory


def pool_directory(policy: Policy, key: str, user: str) -> PoolDirectory:
    """The directory of the pool with that key. ``user``: the local one; empty: who runs the bridge.

    Raises ``OSError`` where the policy no longer says where that user's directories are.
    """
    if not user:
        return RunDirectory(policy.run_dir, key)
    return UserDirectory(run_dir(policy, user), policy.run_dir, key, user, AsUser(policy))
