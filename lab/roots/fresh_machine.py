"""Check of the README on fresh machines: `make demo` and the tests in bare roots of Debian suites."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab.machine.errors import LabError, say
from lab.roots.bare_root import SUITES, Root, fresh

CHECKOUT = Path(__file__).resolve().parents[2]
DIRECTORY = Path("/var/tmp/isthmus-roots")  # noqa: S108 - Slurm's unprivileged jobs must reach what lies there
ROOT, USER = "root", "newcomer"
LAYERS = ("unit", "integration", "chart", "slurm", "kube", "e2e")
NEEDS = "isthmus: python3 cannot create virtual environments; as root: apt-get install python3-venv"


def try_all(suites: Sequence[str], users: Sequence[str], layers: Sequence[str], whole: bool) -> None:
    """Try each suite, or all tests in the suite of the lab. Raises LabError at the first failure."""
    if whole:
        with fresh("bookworm", DIRECTORY) as root:
            _as_root(root, "bookworm", LAYERS, {"ISTHMUS_REQUIRE_ALL": "1"})
        return
    for suite in suites or SUITES:
        for user in users:
            with fresh(suite, DIRECTORY) as root:
                _as_root(root, suite, layers, {}) if user == ROOT else _as_user(root, suite, layers)


def _as_root(root: Root, suite: str, layers: Sequence[str], env: dict[str, str]) -> None:
    checkout = "/srv/isthmus"
    copy_checkout(root.path / checkout[1:])
    _demo_and_tests(root, suite, ROOT, checkout, layers, env)


def _as_user(root: Root, suite: str, layers: Sequence[str]) -> None:
    checkout = f"/home/{USER}/isthmus"
    root.ensure(["useradd", "--create-home", USER])
    copy_checkout(root.path / checkout[1:])
    root.ensure(["chown", "--recursive", f"{USER}:", checkout])
    say(f"{suite}: make demo without python3-venv, as an ordinary user: expecting one line with the missing package")
    if not root.run(["sh", "-c", "make demo >/tmp/said 2>&1"], USER, checkout):
        raise LabError(f"{suite}: make demo succeeded without python3-venv")
    said = (root.path / "tmp/said").read_text().splitlines()
    if said[0] != NEEDS or len(said) > 2:  # the other line is from make
        raise LabError(f"{suite}: make demo said: " + " / ".join(said))
    root.ensure(["sh", "-c", "apt-get -q update && apt-get -qy install --no-install-recommends python3-venv"])
    _demo_and_tests(root, suite, USER, checkout, layers, {})


def _demo_and_tests(
    root: Root, suite: str, user: str, checkout: str, layers: Sequence[str], env: dict[str, str]
) -> None:
    say(f"{suite}: make demo, as {user}")
    root.ensure(["make", "demo"], user, checkout)
    if layers:
        say(f"{suite}: make test, {' '.join(layers)}, as {user}")
        root.ensure(["make", "test", f"LAYERS={' '.join(layers)}"], user, checkout, env)


def copy_checkout(target: Path) -> None:
    """Copy the files of the working tree that git tracks or would add, and the history."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    names = [name for name in listed.split(b"\0") if name and (CHECKOUT / name.decode()).exists()]
    target.mkdir(parents=True)
    pack = ["tar", "--create", "--null", "--files-from=-", "--owner=0", "--group=0"]
    packed = subprocess.run(pack, cwd=CHECKOUT, input=b"\0".join(names), capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", f"--directory={target}"], input=packed, check=True)
    clone = ["git", "clone", "--quiet", "--bare", "--no-local", str(CHECKOUT), str(target / ".git")]
    subprocess.run(clone, check=True)
    subprocess.run(["git", "-C", str(target), "config", "core.bare", "false"], check=True)
    subprocess.run(["git", "-C", str(target), "reset", "--quiet"], check=True)  # makes the index
