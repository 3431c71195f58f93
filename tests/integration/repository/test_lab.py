"""Installation of the tests' requirements, and the count of skipped tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.cluster import TOOLS, Lab
from lab.machine.errors import LabError
from lab.software import cache, debian

ROOT = Path(__file__).parents[3]
SKIPPING = """
import pytest
from tests.conftest import require

@pytest.mark.parametrize("number", range(3))
def test_needs(number, require):
    require(number == 0, "install\\n  the thing")

@pytest.mark.skip(reason="another reason")
def test_never():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_skipped_test_leaves_its_reason(tmp_path: Path, workers: str) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_terminal_summary\n")
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_whole_file.py").write_text("import pytest\npytest.importorskip('nothing', reason='no nothing')\n")
    kept = tmp_path / "skipped"
    kept.write_text("of an earlier layer\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"ISTHMUS_SKIPPED": str(kept), "PYTHONPATH": str(ROOT)}
    environment.pop("ISTHMUS_REQUIRE_ALL", None)
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-c", os.devnull, tmp_path],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(kept.read_text().splitlines()) == [
        "another reason", "install the thing", "install the thing", "no nothing", "of an earlier layer",
    ]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Yield the packages that apt was asked to install; none of them is installed before."""
    asked: list[str] = []
    monkeypatch.setattr(debian, "missing", list)
    monkeypatch.setattr(debian, "install", asked.extend)
    monkeypatch.setattr("lab.software.client_tools.find", lambda: asked.append("client tools"))
    return asked


NAMES = "curl faketime git liblua5.1-0 prometheus shellcheck sudo"


@pytest.mark.parametrize(
    ("user", "apt", "installed", "says"),
    [
        (0, "/usr/bin/apt-get", [*debian.TOOLS, "client tools"], ""),
        (1000, "/usr/bin/apt-get", ["client tools"], f"apt-get install {NAMES}\n"),
        (0, None, ["client tools"], f"not Debian: install the equivalents of {NAMES};"),
    ],
)
def test_tools_are_installed_in_a_writable_place(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    user: int, apt: str | None, installed: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr("shutil.which", lambda name: apt)
    Lab().install([TOOLS])
    said = capsys.readouterr().err
    assert calls == installed
    assert says in said and said.count("\n") == bool(says)


def test_builds_may_be_kept_apart_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ISTHMUS_BUILDS", raising=False)
    assert cache.build("a", lambda target: (target / "x").touch()) == tmp_path / "cache" / "a"
    monkeypatch.setenv("ISTHMUS_BUILDS", str(tmp_path / "builds"))
    assert cache.build("a", lambda target: (target / "x").touch()) == tmp_path / "builds" / "a"
    assert cache.folder("b", lambda target: (target / "x").touch()) == tmp_path / "cache" / "b"
    assert (tmp_path / "builds" / "a" / "x").exists() and (tmp_path / "builds" / "locks" / "a").exists()


def test_an_unwritable_cache_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(LabError, match=r"the cache .*/file cannot be written \(Not a directory\); set ISTHMUS_CACHE"):
        cache.folder("a", lambda target: None)
