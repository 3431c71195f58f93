"""The documentation builds without a warning, and its generated pages match the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.reference.__main__ import main as write_reference

ROOT = Path(__file__).parents[3]


def build(configuration: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site), "--config-file"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, str(configuration)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    # A link to a file of the repository leads to a copy of the file.
    assert (tmp_path / "repository" / "bridge" / "examples" / "policy.yaml.txt").read_bytes() == (
        ROOT / "bridge" / "examples" / "policy.yaml"
    ).read_bytes()
    assert (
        'href="../../../repository/bridge/examples/policy.yaml.txt"'
        in (tmp_path / "operating" / "bridge" / "install" / "index.html").read_text()
    )


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#nowhere", "../bridge/nowhere.yaml"])
def test_a_dead_link_fails_the_build(tmp_path: Path, link: str) -> None:
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text(f"# Home\n\n[here]({link})\n")
    configuration = tmp_path / "mkdocs.yml"
    text = (ROOT / "mkdocs.yml").read_text().partition("nav:\n- Home")[0]
    configuration.write_text(text.replace("docs/.site/outside.py", str(ROOT / "docs" / ".site" / "outside.py")))
    done = build(configuration, tmp_path / "site")
    assert done.returncode != 0 and "nowhere" in done.stderr


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
def test_the_tests_in_the_tables_of_attacks_exist() -> None:
    """Each row of the two tables names its tests."""
    text = (ROOT / "docs" / "design" / "security.md").read_text(encoding="utf-8")
    part = text[text.index("## What a malicious party can do") : text.index("### Bounds on what clients send")]
    rows = [line for line in part.splitlines() if line.startswith("| ") and "Proved by" not in line]
    assert len(rows) >= 20
    missing = []
    for row in rows:
        named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", row)
        assert named or "[below]" in row or "the same" in row, row
        for file, test in named:
            found = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(file)]
            if not any(f"def {test or 'test_'}" in content for content in found):
                missing.append(f"{file}::{test}")
    assert missing == []


def test_the_reference_is_the_generated_one(tmp_path: Path) -> None:
    write_reference(tmp_path)
    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert generated == {path.name: path.read_text() for path in (ROOT / "docs" / "reference").iterdir()}, (
        "run `make generate`"
    )


def test_the_paths_that_documents_name_exist() -> None:
    """Each name of a Python file, and each path in a top-level folder, exists in the repository."""
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {
        "build",
        "dist",
        "runs",
    }
    found = [path for name in top for path in (ROOT / name).rglob("*")]
    there = {*top, *(str(path.relative_to(ROOT)) for path in found)}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    users_own = {"train.py", "net.py", "torch.py", "isthmus.py"}
    missing = []
    for page in pages:
        for name in set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*)/?`", page.read_text(encoding="utf-8"))) - users_own:
            named = name.endswith(".py") or ("/" in name and name.partition("/")[0] in top)
            if named and not any(path == name or path.endswith(f"/{name}") for path in there):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert len(pages) > 50 and missing == []
