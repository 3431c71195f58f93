"""Local users of this machine, and a site whose bridge acts as them through a real sudo rule."""

import pwd
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus_contracts.identities import operator_identity

from .slurm_site import Site

ALICE, BOB = "isthmus-alice", "isthmus-bob"
# Callers and their local users.
CALLERS = {"prod": ALICE, "other": BOB}
SUDOERS = Path("/etc/sudoers.d")


def as_user(user: str, *argv: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program as a user, without PAM and without a shell."""
    command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=check, cwd="/")


@contextmanager
def accounts() -> Iterator[None]:
    """Create the users, and remove them at the end."""
    made = []
    try:
        for user in (ALICE, BOB):
            try:
                pwd.getpwnam(user)
            except KeyError:
                subprocess.run(
                    ["useradd", "--system", "--user-group", "--no-create-home", "--shell=/bin/bash", user], check=True
                )
                made.append(user)
        yield
    finally:
        for user in made:
            subprocess.run(["userdel", user], capture_output=True, check=False)


class Rule:
    """File in /etc/sudoers.d."""

    def __init__(self, text: str) -> None:
        self.path = SUDOERS / f"isthmus-test-{secrets.token_hex(4)}"
        self.path.touch(mode=0o440)
        self.path.write_text(text)

    def remove(self) -> None:
        """Remove the rule."""
        self.path.unlink(missing_ok=True)


def prepare(site: Site, conf: Path) -> None:
    """Add local users to the site's policy, and create their directories, as its admin does."""
    site.folder.chmod(0o711)
    users = site.folder / "users"
    for user in CALLERS.values():
        (users / user).mkdir(parents=True, mode=0o700)
    users.chmod(0o755)
    site.let_all_users_inject_faults()
    site.settings["users"] = {"run_dir": f"{users}/{{user}}"}
    site.settings["slurm"]["conf"] = str(conf)
    site.settings["identities"] = [{"uri": operator_identity(caller), "user": user} for caller, user in CALLERS.items()]
    site.write_policy()
    # The bridge's user owns everything else, but must not own this directory.
    shutil.chown(users, 0, 0)
    for user in CALLERS.values():
        shutil.chown(users / user, user, user)
    (site.folder / "run").mkdir(mode=0o700, exist_ok=True)
    shutil.chown(site.folder / "run", site.folder.owner(), site.folder.group())
