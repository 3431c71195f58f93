"""Check that only root and the bridge's user can change, or read, the files that control the bridge.

Like sshd's StrictModes, it examines each file and each folder above it, since a user who can rename a file can replace
it.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from isthmus_contracts.identities import KEY_FILE

from ..parties import signing_root
from ..policy.policy import Policy, PolicyError
from ..users.doctor import code_paths
from ..users.sudoers import run_dir
from ..users.user_checks import local_users


@dataclass(frozen=True)
class Finding:
    """A finding about one file or folder."""

    blocks_serving: bool
    """True if another user can certainly act as the bridge, which then refuses to serve."""
    line: str
    path: Path | None = None


@dataclass(frozen=True)
class _Item:
    """A path that controls the bridge."""

    name: str
    path: Path
    secret: bool = False
    of_jobs: bool = False
    """True if only jobs use it. It does not control the bridge, and the jobs' user may own it."""
    owner: int | None = None
    """The uid of one more user who may change it."""
    written: bool = False
    """True if the bridge creates it and writes into it."""


def examine(policy: Policy, file: Path) -> Iterator[Finding]:
    """Yield all findings, each path once. ``file``: the policy file."""
    _others.cache_clear()
    people = _People(policy)
    seen = set[Path]()
    for item in _items(policy, file):
        for found in sorted(_faults(item, people), key=lambda one: not one.blocks_serving):
            if found.path is not None and found.path not in seen:
                seen.add(found.path)
                yield found
    yield from _own_jobs(policy, file, people)


def require(policy: Policy, file: Path) -> list[str]:
    """Return the findings that are warnings. Raises :class:`PolicyError` if another user can act as the bridge."""
    found = list(examine(policy, file))
    if blocking := [one.line for one in found if one.blocks_serving]:
        raise PolicyError("another user can act as the bridge: " + "; ".join(blocking))
    return [one.line for one in found]


def readable_by_others(path: Path) -> bool:
    """Return whether users other than root and the bridge's can read the file."""
    found = path.stat()
    of_group = bool(found.st_mode & 0o040 and _others(found.st_gid, frozenset({0, os.geteuid()})))
    return of_group or bool(found.st_mode & 0o004)


def _items(policy: Policy, file: Path) -> Iterator[_Item]:
    yield _Item("policy", file.absolute())
    yield _Item("tls_dir", policy.tls_dir)
    yield _Item("tls_dir", policy.tls_dir / KEY_FILE, secret=True)
    yield _Item("the site's CA", policy.tls_dir.parent / "ca.key", secret=True)
    for folder in (policy.tls_dir, policy.tls_dir.parent):
        yield _Item("the site's signing root", folder / signing_root.KEY_FILE, secret=True)
    for number, gateway in enumerate(policy.gateways):
        if (authority := gateway.authority_file(policy.tls_dir)) is not None:
            yield _Item(f"gateways[{number}].ca", authority)
    yield _Item("run_dir", policy.run_dir, written=True)
    yield _Item("journal", policy.journal_path, written=True)
    yield _Item("audit_log", policy.audit_path, written=True)
    for name, path in (("slurm.bin_dir", policy.slurm.bin_dir), ("slurm.conf", policy.slurm.conf),
                       ("slurm.pyslurm.python", policy.slurm.pyslurm.python)):  # fmt: skip
        if path is not None:
            yield _Item(name, path)
    if policy.slurm.rest is not None and policy.slurm.rest.token_file is not None:
        yield _Item("slurm.rest.token_file", policy.slurm.rest.token_file, secret=True)
    for path in dict.fromkeys(code_paths()):
        yield _Item("the bridge's code", path)
    for user in local_users(policy):
        if (uid := _uid(user)) is not None:
            yield _Item("users.run_dir", run_dir(policy, user), owner=uid)
    for name, environment in sorted(policy.environments.items()):
        for path in (environment.venv, environment.apptainer):
            if path is not None:
                yield _Item(f"environments.{name}", path, of_jobs=True)


class _People:
    """The users who may control the bridge, and those whose jobs run."""

    def __init__(self, policy: Policy) -> None:
        self.me = os.geteuid()
        self.trusted = frozenset({0, self.me})
        users = {_uid(user) for user in local_users(policy)} - {None, self.me}
        self.job_users = frozenset(uid for uid in users if uid is not None)


def _faults(item: _Item, people: _People) -> Iterator[Finding]:
    trusted = people.trusted | ({item.owner} if item.owner is not None else frozenset())
    target = Path(os.path.realpath(item.path))
    for path, found in _chain(item.path):
        # In a sticky folder users cannot rename or remove files of others: each file is examined by itself. The mode
        # of a link is meaningless.
        kept = stat.S_ISLNK(found.st_mode) or bool(found.st_mode & stat.S_ISVTX and path != target)
        open_to_all = not _shielded(path, trusted)
        where = f"{item.name}: {path}"
        if found.st_mode & 0o002 and not kept:
            yield Finding(open_to_all and not item.of_jobs, f"{where} is writable by everybody; chmod o-w {path}", path)
        if found.st_mode & 0o020 and not kept:
            group, others = _group(found.st_gid), _others(found.st_gid, trusted)
            if others:
                line = f"{where} is writable by the group {group} ({_some(others)}); chmod g-w {path}"
                yield Finding(open_to_all and not item.of_jobs, line, path)
            elif found.st_gid not in _own_groups(people.me):
                yield Finding(False, f"{where} is writable by the group {group}; chmod g-w {path}", path)
        if found.st_uid not in trusted and not item.of_jobs:
            name = _user(found.st_uid)
            of_jobs = found.st_uid in people.job_users
            # An admin of the site may own the policy or the software. But paths that the bridge writes into must be
            # its own, and anyone may have created a path in a folder like /tmp.
            made = (item.written and path == target) or bool(path.parent.stat().st_mode & 0o002)
            who = f"{name}, whose jobs the bridge submits" if of_jobs else f"{name}, who can change it"
            fix = f"remove it, or choose another {item.name}" if made else f"chown root {path}"
            yield Finding(open_to_all and (of_jobs or made), f"{where} belongs to {who}; {fix}", path)
    if item.secret:
        yield from _secret(item, trusted)


def _secret(item: _Item, trusted: frozenset[int]) -> Iterator[Finding]:
    try:
        found = item.path.stat()
    except OSError:
        return
    where, fix = f"{item.name}: {item.path}", f"chmod o= {item.path}"
    if found.st_mode & 0o004:
        yield Finding(not _shielded(item.path, trusted), f"{where} is readable by everybody; {fix}", item.path)
    elif found.st_mode & 0o040 and (others := _others(found.st_gid, trusted)):
        line = f"{where} is readable by the group {_group(found.st_gid)} ({_some(others)}); chmod g= {item.path}"
        yield Finding(False, line, item.path)


def _own_jobs(policy: Policy, file: Path, people: _People) -> Iterator[Finding]:
    """Yield what jobs can do if they run as the bridge's own user."""
    if local_users(policy) and all(identity.user for identity in policy.identities):
        return
    name = _user(people.me)
    if people.me == 0:
        line = "jobs run as root and can change everything; run the bridge as an ordinary user"
        yield Finding(False, f"users: {line}")
        return
    governs = [item for item in _items(policy, file) if not item.secret and not item.of_jobs and item.owner is None]
    own = dict.fromkeys(
        path for item in governs if not item.written
        for path, found in _chain(item.path) if _changes(found, people.me)
    )  # fmt: skip
    # Skip parents of listed paths.
    listed = [path for path in own if not any(other in path.parents for other in own)]
    if listed:
        line = f"jobs run as {name}, the bridge's own user, and can change {', '.join(map(str, listed))}"
        yield Finding(False, f"users: {line}; let root own them: chown -R root PATH")
    line = f"jobs run as {name}, the bridge's own user, and can read {policy.tls_dir / KEY_FILE} and write the journal"
    yield Finding(False, f"users: {line}; map each identity to a local user (identities[].user)")


def _changes(found: os.stat_result, uid: int) -> bool:
    if stat.S_ISLNK(found.st_mode):
        return False
    return found.st_uid == uid or bool(found.st_mode & 0o020 and found.st_gid in _own_groups(uid) - {0})


def _chain(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the path, its parents and its link targets, as far as they exist, with their lstat."""
    todo, seen = [path], set[Path]()
    while todo:
        one = Path(os.path.normpath(todo.pop(0)))
        if one in seen:
            continue
        seen.add(one)
        todo.append(one.parent)
        try:
            found = one.lstat()
            if stat.S_ISLNK(found.st_mode):
                todo.append(one.parent / one.readlink())
        except OSError:
            continue
        yield one, found


def _shielded(path: Path, trusted: frozenset[int]) -> bool:
    """Return whether a parent folder keeps all other users out."""
    for parent in path.parents:
        try:
            found = parent.stat()
        except OSError:
            continue
        if found.st_mode & 0o001 or found.st_uid not in trusted:
            continue
        if not found.st_mode & 0o010 or not _others(found.st_gid, trusted):
            return True
    return False


@cache
def _others(gid: int, trusted: frozenset[int]) -> tuple[str, ...]:
    """Return the members of a group who are not trusted."""
    try:
        members = grp.getgrgid(gid).gr_mem
    except KeyError:
        members = []
    names = {name for name in members if _uid(name) not in trusted}
    return tuple(
        sorted(names | {user.pw_name for user in _all_users() if user.pw_gid == gid and user.pw_uid not in trusted})
    )


@cache
def _all_users() -> tuple[pwd.struct_passwd, ...]:
    return tuple(pwd.getpwall())


def _own_groups(uid: int) -> frozenset[int]:
    """Return the primary groups of root and of the bridge's user."""
    try:
        return frozenset({0, pwd.getpwuid(uid).pw_gid})
    except KeyError:
        return frozenset({0, os.getegid()})


def _uid(user: str) -> int | None:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def _some(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
