"""Tells an admin whether the bridge can be other local users here, and whether sudo lets it do more than it must."""

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
    """Lines, each with whether it is well; none where the policy names no local users."""
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
    """Whether the queue shows other users' jobs to the bridge."""
    if not local_users(policy):
        return
    assert policy.users is not None
    if not described.private_jobs:
        yield True, "queue: shows other users' jobs (no PrivateData=jobs)"
    elif policy.users.operator:
        yield True, "queue: PrivateData=jobs; the policy says that this user is an operator of Slurm (users.operator)"
    else:
        yield (
            False,
            "queue: PrivateData hides other users' jobs; make this user an operator, and say users.operator: true",
        )


def _becomes(policy: Policy, user: str) -> tuple[bool, str]:
    who = f"local user {user}"
    try:
        told = AsUser(policy).ask(user, "hello")
    except AsUserError as error:
        return False, f"{who}: {error.strerror}; `isthmus-bridge sudoers` prints the rule that this takes"
    if not isinstance(told, dict) or told.get("user") != user:
        return False, f"{who}: sudo makes the bridge somebody else"
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
        return False, "sudo: does not tell what it allows this user (`sudo --list`)"
    if more := surplus(result.output, policy, users):
        return False, f"sudo: allows this user more than the bridge needs: {'; '.join(more)}"
    return True, "sudo: allows this user nothing else"


def _unchangeable() -> tuple[bool, str]:
    """Whoever can change what sudo runs can run anything."""
    if path := changeable(code_paths()):
        message = f"{path} is not root's alone, and sudo runs what is there: let root install the bridge"
        return False, f"sudo: {message}"
    return True, "sudo: what it runs can be changed by root only"


def code_paths() -> list[Path]:
    """Where the helper's code comes from."""
    found = [Path(sys.executable), Path(sys.prefix), Path(os.__file__).parent]
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).parent)
    # What lies on the way is imported from, or is read at each start (*.pth).
    return [*found, *(path for path in map(Path, sys.path) if _is_there(path))]


def _is_there(path: Path) -> bool:
    """Return whether an entry of the import path is a place: finders of editable installations are none.

    Where this user may not look, nothing is imported from.
    """
    with suppress(PermissionError):
        return path.is_absolute() and path.exists()
    return False


def changeable(paths: Iterable[Path]) -> Path | None:
    """The first of the paths, of what is above them or of what they link to, that others than root may change."""
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
