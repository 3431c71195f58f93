"""The repository passes its own checks, and git runs the hook for commit messages."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_repository_passes() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "tools.checks"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_hook_refuses_a_bad_subject(tmp_path: Path, require: Callable[[bool, str], None]) -> None:
    require(shutil.which("git") is not None, "install Debian's package git")
    shutil.copytree(ROOT / ".githooks", tmp_path / ".githooks")
    (tmp_path / "tools" / "checks").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "checks" / "commit_subject.py", tmp_path / "tools" / "checks")

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        identity = ["-c", "user.name=One", "-c", "user.email=one@example.org"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, check=False, text=True)

    assert git("init", "-q").returncode == 0
    assert git("config", "core.hooksPath", ".githooks").returncode == 0
    refused = git("commit", "--allow-empty", "-m", "Added a codec.")
    assert refused.returncode != 0
    assert 'begins with "Added"' in refused.stderr and "period" in refused.stderr
    assert git("log").returncode != 0
    assert git("commit", "--allow-empty", "-m", "Add a codec").returncode == 0
    assert git("log", "--format=%s").stdout == "Add a codec\n"
