"""Unprivileged user who runs the bridge and owns the Slurm jobs."""

from __future__ import annotations

import pwd
import shutil
import subprocess
from pathlib import Path

from lab.machine.errors import LabError, say
from lab.machine.network import NETNS_DIRECTORY
from lab.machine.paths import DEFAULT_NAME

USER = "isthmus"
# Marks an account that a lab created, as opposed to an earlier one.
COMMENT = "Isthmus lab"


def ensure(home: Path) -> None:
    """Create the user if it is missing, and its home in this lab."""
    account = _account()
    if account is None:
        _run("useradd", "--system", "--user-group", "--no-create-home", f"--home-dir={home}",
             "--shell=/bin/bash", f"--comment={COMMENT}", USER)  # fmt: skip
    elif account.pw_gecos == COMMENT and not Path(account.pw_dir).exists():
        # Another lab created the user and was removed with its home. A third lab may use the user now: then keep its
        # entry. Only programs that use ~isthmus instead of $HOME notice.
        _run("usermod", f"--home={home}", USER, may_fail="is currently used")
    home.mkdir(exist_ok=True)
    home.chmod(0o755)
    shutil.chown(home, USER, USER)


def remove(lab_name: str) -> None:
    """Remove the user if a lab created it and no other lab runs."""
    account = _account()
    if account is None or account.pw_gecos != COMMENT:
        return
    namespaces = [entry.name for entry in NETNS_DIRECTORY.iterdir()] if NETNS_DIRECTORY.exists() else []
    if any(name.startswith(DEFAULT_NAME) and name != lab_name for name in namespaces):
        return
    result = subprocess.run(["userdel", USER], capture_output=True, text=True, check=False)
    if result.returncode:
        say(f"the user {USER} is kept: {result.stderr.strip()}")


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        return None


def _run(*argv: str, may_fail: str | None = None) -> None:
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode and not (may_fail and may_fail in result.stderr):
        raise LabError(f"`{argv[0]}` failed: {result.stderr.strip()}")
