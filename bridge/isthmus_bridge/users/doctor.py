"""Checks for the doctor command: whether the bridge can act as its local users, and sudo allows nothing else."""

import importlib.util
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..policy.policy import Policy
from ..slurm.command import CommandOutputTooLong, CommandTimeout, run
from ..slurm.environment import DEFAULT_PATH
from ..slurm.model import SiteDescription
from ..slurm.run_as import AsUserError
from .helper_client import AsUser
from .sudoers import run_dir, surplus
from .user_checks import faults, local_users

_SECONDS = 30.0
_PACKAGES = ("isthmus_bridge", "isthmus_contracts")


def examine(policy: Policy) -> Iterator[tuple[bool, str]]:
    """Yield (good, message) for each check; nothing if the policy names no local users."""
    users = local_users(policy)
    if not users:
        return
    found = list(faults(policy))
    yield from ((False, line) for line in found)
    if found:
        return
    for user in users:
        yield _becomes(policy, user)
    yield _nothing_else(policy, users)
    yield _unchangeable()


def visibility(policy: Policy, described: SiteDescription) -> Iterator[tuple[bool, str]]:
    """Yield whether the queue shows other users' jobs to the bridge, as (good, message)."""
    if not local_users(policy):
        return
    assert policy.users is not None
    if not described.private_jobs:
        yield True, "queue: shows other users' jobs (no PrivateData=jobs)"
    elif policy.users.operator:
        yield True, "queue: PrivateData=jobs; the policy states that this user is a Slurm operator (users.operator)"
    else:
        yield (
            False,
            "queue: PrivateData hides other users' jobs; make this user a Slurm operator, and set users.operator: true",
        )


def _becomes(policy: Policy, user: str) -> tuple[bool, str]:
    who = f"local user {user}"
    try:
        answer = AsUser(policy).ask(user, "hello")
    except AsUserError as error:
        return False, f"{who}: {error.strerror}; `isthmus-bridge sudoers` prints the rule that this needs"
    if not isinstance(answer, dict) or answer.get("user") != user:
        return False, f"{who}: sudo runs the helper as another user"
    return True, f"{who}: the bridge can submit and cancel as that user; files in {run_dir(policy, user)}"


def _nothing_else(policy: Policy, users: Sequence[str]) -> tuple[bool, str]:
    assert policy.users is not None
    argv = [str(policy.users.sudo), "--non-interactive", "--list"]
    env = {"PATH": f"{DEFAULT_PATH}:/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        result = run(argv, env=env, timeout=_SECONDS)
    except (CommandTimeout, CommandOutputTooLong) as error:
        return False, f"sudo: {error}"
    except OSError as error:
        return False, f"sudo: {policy.users.sudo}: {error.strerror}"
    if result.status:
        return False, "sudo: does not list what it allows this user (`sudo --list`)"
    if more := surplus(result.output, policy, users):
        return False, f"sudo: allows this user more than the bridge needs: {'; '.join(more)}"
    return True, "sudo: allows this user nothing else"


def _unchangeable() -> tuple[bool, str]:
    """Check that only root can change the programs that sudo runs: others could run anything as those users."""
    if path := changeable(code_paths()):
        message = f"users other than root can change {path}, which sudo runs: let root install the bridge"
        return False, f"sudo: {message}"
    return True, "sudo: only root can change the programs that it runs"


def code_paths() -> list[Path]:
    """Return the paths from which the helper's code is loaded."""
    found = [Path(sys.executable), Path(sys.prefix), Path(os.__file__).parent]
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).parent)
    # Python imports from each entry of the path, or reads it at each start (*.pth).
    return [*found, *(path for path in map(Path, sys.path) if _is_there(path))]


def _is_there(path: Path) -> bool:
    """Return whether an entry of the import path exists as a file or folder. Finders of editable installations do not.

    Nothing can be imported from an entry that this user cannot access.
    """
    with suppress(PermissionError):
        return path.is_absolute() and path.exists()
    return False


def changeable(paths: Iterable[Path]) -> Path | None:
    """Return the first path that users other than root can change, among the paths, their parents and link targets."""
    todo, seen = list(paths), set[Path]()
    while todo:
        path = Path(os.path.normpath(todo.pop(0)))
        if path in seen:
            continue
        seen.add(path)
        try:
            found = path.lstat()
        except OSError:
            continue
        if stat.S_ISLNK(found.st_mode):
            todo.append(path.parent / path.readlink())
        elif found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            return path
        if found.st_uid != 0:
            return path
        todo.append(path.parent)
    return None
