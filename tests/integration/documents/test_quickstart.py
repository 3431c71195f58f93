"""The quickstart, and the part of the data scientist's tutorial that needs no cluster, done as they say."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.run_documentation import ROOT, Walk, steps

PAGES = ("quickstart.md", *(f"tutorials/{path.name}" for path in (ROOT / "docs" / "tutorials").iterdir()))


@pytest.fixture
def walk(tmp_path: Path) -> Walk:
    """In a directory that has the examples, and an activated virtual environment."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return Walk(tmp_path, {**os.environ, "PATH": path, "COLUMNS": "120"})


@pytest.mark.timeout(900)
def test_the_quickstart(walk: Walk) -> None:
    walk.follow("quickstart.md")
    ran = "\n".join(walk.said)
    assert "digits is valid: 20 rounds, 4 clients" in ran
    assert "model.pt" in ran and '"round": 20' in ran


@pytest.mark.timeout(900)
def test_a_script_is_ported(walk: Walk) -> None:
    walk.follow("tutorials/data-scientist.md", lambda step: "kubectl" not in step.command)
    ran = "\n".join(walk.said)
    assert "my-digits is valid: 15 rounds, 3 clients" in ran
    assert (walk.directory / "run" / "model.pt").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes_by_its_looks(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    opened = re.findall(r"^```(.*)$", text, re.MULTILINE)[::2]
    assert all(re.fullmatch(r'console|sh|\w+ title="[\w.-]+"', block) for block in opened), opened
    assert len(list(steps(page))) >= sum(block != "sh" for block in opened)
