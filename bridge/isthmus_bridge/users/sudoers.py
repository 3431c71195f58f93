"""The exact commands that the bridge runs through sudo, and the sudoers rule that allows only these. Pure functions."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..policy.fields import PLAIN_PATH
from ..policy.policy import Policy
from ..slurm.run_as import AsUserError

_ALIAS = "ISTHMUS_BRIDGE"
MODULE = "isthmus_bridge.users.helper"


class RuleError(ValueError):
    """A path cannot be used in a sudoers rule. ``str()`` is one line."""


def run_dir(policy: Policy, user: str) -> Path:
    """Return the directory of that user's pools. Raises ``OSError`` if the policy has no settings of local users."""
    if policy.users is None:
        raise AsUserError("the policy has no settings `users`")
    return Path(str(policy.users.run_dir).replace("{user}", user))


def helper(policy: Policy, user: str, python: str = sys.executable) -> list[str]:
    """Return the helper's command line for that user. It holds nothing of a request, and sudo allows no other."""
    slurm = policy.slurm
    # -I ignores the environment and the user's own packages.
    argv = [python, "-I", "-m", MODULE, "--run-dir", str(run_dir(policy, user))]
    argv += ["--bin-dir", str(slurm.bin_dir)] if slurm.bin_dir else []
    return argv + (["--conf", str(slurm.conf)] if slurm.conf else [])


def command(policy: Policy, user: str) -> list[str]:
    """Return the command line that runs the helper through sudo. Raises ``OSError``, as :func:`run_dir`."""
    if policy.users is None:
        raise AsUserError("the policy has no settings `users`")
    return [str(policy.users.sudo), "--non-interactive", f"--user={user}", "--", *helper(policy, user)]


def fragment(policy: Policy, bridge_user: str, users: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a file for /etc/sudoers.d. Raises :class:`RuleError`."""
    commands = {user: " ".join(_plain(helper(policy, user))) for user in users}
    yield "# What isthmus-bridge may do as other users; made by `isthmus-bridge sudoers`. Install it as root:"
    yield "#   isthmus-bridge sudoers ... >isthmus-bridge && visudo -cf isthmus-bridge &&"
    yield "#     install -m 0440 isthmus-bridge /etc/sudoers.d/isthmus-bridge"
    yield f"Cmnd_Alias {_ALIAS} = \\"
    for number, user in enumerate(users):
        yield f"    {commands[user]}" + (", \\" if number < len(users) - 1 else "")
    # Its standard input carries private keys, which must not be logged.
    yield f"Defaults!{_ALIAS} env_reset, !setenv, !requiretty, !log_input, !log_output"
    for user in users:
        yield f"{bridge_user} ALL = ({user}) NOPASSWD: NOSETENV: {commands[user]}"


def surplus(listing: str, policy: Policy, users: Sequence[str]) -> list[str]:
    """Return the lines of `sudo --list` that allow the bridge's user more than its rules."""
    wanted = {(user, " ".join(helper(policy, user))) for user in users}
    found = []
    for line in listing.partition("may run the following commands")[2].splitlines()[1:]:
        match = re.fullmatch(r"\(([^)]*)\) *((?:[A-Z_]+: *)*)(.*)", line.strip())
        if match is None:
            found += [line.strip()] if line.strip() else []
        else:
            found += [line.strip() for each in match[3].split(", ") if (match[1].strip(), each.strip()) not in wanted][
                :1
            ]
    return found


def _plain(argv: Sequence[str]) -> Sequence[str]:
    for word in argv:
        if word.startswith("/") and PLAIN_PATH.fullmatch(word) is None:
            raise RuleError(f"{word!r} cannot be used in sudoers; use a path of letters, digits and . _ - + @")
    return argv
