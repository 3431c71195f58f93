"""Lab with a newer Slurm and pyslurm, in a root of Debian forky.

Debian 12 has Slurm 22.05. forky has 26.05, and PyPI's pyslurm builds there. Changes that a command
makes in the root are lost afterwards: a file system in memory is mounted over the cached root.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lab.machine.errors import say
from lab.machine.paths import DEFAULT_DIRECTORY
from lab.roots.bare_root import Root, base, prepare
from lab.roots.fresh_machine import CHECKOUT
from lab.software import cache, debian

SUITE = "forky"
RECIPE = 1  # increase when a change affects the result
PYSLURM = "25.11.2"
PYTHON = "/opt/isthmus/bin/python"
# Build dependencies of pyslurm, in the versions of the suite.
BUILD = (
    "python3-venv", "python3-dev", "gcc", "libc6-dev", "dpkg-dev", "libslurm-dev", "cython3", "python3-setuptools",
    "python3-wheel", "python3-packaging",
)  # fmt: skip
# Packages of the checkout.
PACKAGES = ("contracts", "bridge")
TESTS = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
# pyslurm 25.11 wants the headers of 25.11: the version's number is put into a copy of those that are there, and three
# names of then are mapped to those of now. No line of pyslurm is changed.
COMPILE = f"""
set -e
mkdir /tmp/headers && cp -r /usr/include/slurm /tmp/headers/slurm
sed -i -E 's/(#define SLURM_VERSION_NUMBER) .*/\\1 0x190b00/' /tmp/headers/slurm/slurm_version.h
export CFLAGS="-O0 -g0 -DSLURM_BACKWARD_COMPAT -Dslurm_free_ctl_conf=slurm_free_conf \
-DESLURM_ERROR_ON_DESC_TO_RECORD_COPY=2027"
export SLURM_LIB_DIR=/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH) SLURM_INCLUDE_DIR=/tmp/headers
{PYTHON} -m pip install -q --no-build-isolation --no-deps --no-binary=:all: pyslurm=={PYSLURM}
rm -r /tmp/headers
"""


def find() -> Path:
    """Return the root with Slurm, pyslurm and the tests' dependencies; build it on first use."""

    def make(target: Path) -> None:
        say(f"making a root of Debian {SUITE} with its Slurm and pyslurm {PYSLURM} (some minutes, once)")
        subprocess.run(["cp", "-a", "--reflink=auto", f"{base(SUITE)}/.", target], check=True)
        root = prepare(target)
        root = replace(root, shown=(*root.shown, CHECKOUT))
        packages = [*debian.BASE, *debian.SLURM, *BUILD]
        # The packages start no daemons: there is no init.
        install = f"apt-get -qq update && apt-get -qqy install --no-install-recommends {' '.join(packages)}"
        root.ensure(["sh", "-c", f"({install}) >/tmp/apt.log 2>&1 || {{ tail /tmp/apt.log; exit 1; }}"])
        root.ensure(["python3", "-m", "venv", "--system-site-packages", str(Path(PYTHON).parents[1])])
        wanted = [*_requirements(), *TESTS]
        root.ensure([PYTHON, "-m", "pip", "install", "-q", "-c", f"{CHECKOUT}/constraints.txt", *wanted])
        root.ensure(["sh", "-c", COMPILE])

    return cache.build(f"root-{SUITE}-slurm-{RECIPE}", make)


def run(command: Sequence[str], env: dict[str, str]) -> int:
    """Run a command in a lab with that Slurm and return its exit status. Its processes end with it."""
    debian.require_root("a lab of another suite")
    lower = find()
    lab = f"{PYTHON} -m lab"
    # In the root, the lab's default directory is free.
    script = f"{lab} up --only slurm && {lab} exec -- {shlex.join(command)}; code=$?; {lab} down; exit $code"
    with ExitStack() as stack:
        scratch, installed = (
            Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=f"isthmus-{name}-", dir=DEFAULT_DIRECTORY.parent)
                )
            )
            for name in ("newer-slurm", "installed")
        )
        _install(installed)
        paths = [*(str(CHECKOUT / name) for name in PACKAGES), str(CHECKOUT), str(installed)]
        variables = {"PYTHONPATH": ":".join(paths), "PYTHONDONTWRITEBYTECODE": "1", "ISTHMUS_PYSLURM": PYTHON, **env}
        root = Root(scratch, (CHECKOUT, installed), lower)
        return root.run(["sh", "-c", script], cwd=str(CHECKOUT), env=variables)


def _install(folder: Path) -> None:
    """Write metadata of the checkout's packages to a folder of Python's path: they read their version from it."""
    folder.chmod(0o755)
    version = (CHECKOUT / "VERSION").read_text().strip()
    for package in PACKAGES:
        metadata = folder / f"isthmus_{package}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: isthmus-{package}\nVersion: {version}\n")


def _requirements() -> list[str]:
    """Return the third-party dependencies of contracts and bridge."""
    import tomllib

    found = set[str]()
    for package in PACKAGES:
        listed = tomllib.loads((CHECKOUT / package / "pyproject.toml").read_text())["project"]["dependencies"]
        found |= {each for each in listed if not each.startswith("isthmus")}
    return sorted(found)
