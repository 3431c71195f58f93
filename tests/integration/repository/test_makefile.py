"""Each target installs only what it needs before it runs; if it cannot, it says what is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lab.roots.fresh_machine import NEEDS

ROOT = Path(__file__).parents[3]
PACKAGES = ["-e contracts", "-e runtime", "-e bridge", "-e operator", "-e examples"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout without a virtual environment, with the files that the Makefile reads."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for package in PACKAGES:
        (tmp_path / package.split()[1]).mkdir()
        (tmp_path / package.split()[1] / "pyproject.toml").touch()
    return tmp_path


def make(checkout: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    # Leave out the variables of a make that runs these tests.
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=checkout, env={**kept, "LC_ALL": "C", **env}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ("install", []), ("demo", []), ("test", ["test"]), ("test-fast", ["test"]), ("lint", ["lint"]),
        ("docs", ["docs"]), ("bench", ["bench"]), ("generate", ["generate"]), ("dist", ["release"]), ("setup", ["dev"]),
    ],
)  # fmt: skip
def test_a_target_installs_the_packages_and_its_group(checkout: Path, target: str, groups: list[str]) -> None:
    lines = make(checkout, "--dry-run", target).stdout.splitlines()
    installs = [line.partition(" pip install ")[2] for line in lines if " pip install " in line]
    assert all("-c constraints.txt" in line for line in installs)
    assert installs[1].endswith(" ".join(PACKAGES))
    assert [line.partition(" --group ")[2] for line in installs[2:]] == groups
    used = [number for number, line in enumerate(lines) if line.startswith((".venv/bin/isthmus", "NO_MKDOCS"))]
    assert not used or lines.index("touch .venv/.with-product") < used[0]


def test_an_ordinary_user_sees_what_is_missing(checkout: Path) -> None:
    programs = checkout / "programs"
    programs.mkdir()
    # A Python without ensurepip, like Debian's without python3-venv; and a user who is not root.
    (programs / "python3").write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    (programs / "id").write_text("#!/bin/sh\necho 1000\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    done = make(checkout, "demo", PATH=f"{programs}:{os.environ['PATH']}", PYTHON="python3")
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0
    assert said[0] == NEEDS
    assert [line.partition(":")[0] for line in said[1:]] == ["make"]
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_is_named(checkout: Path) -> None:
    done = make(checkout, "demo", PYTHON="false")
    assert done.returncode != 0
    assert done.stdout.splitlines()[0] == "isthmus: needs Python 3.11 or newer; set PYTHON=/path/to/python3"
