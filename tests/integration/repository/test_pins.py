"""The versions in constraints.txt hold for every Python that README.md promises."""

import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[3]
PYTHONS = ["3.11.2", "3.12", "3.13", "3.14"]


def pins() -> dict[str, str]:
    """Return the pinned version by the package's canonical name."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in wanted}


@pytest.mark.parametrize("python", PYTHONS)
def test_no_pinned_version_refuses_a_promised_python(python: str) -> None:
    pinned, refusing, seen = pins(), {}, set()
    for each in distributions():
        name = canonicalize_name(each.name)
        if pinned.get(name) == Version(each.version).public:  # torch is 2.13.0+cpu, for instance
            seen.add(name)
            needs = each.metadata.get("Requires-Python") or ""
            if not SpecifierSet(needs).contains(python):
                refusing[name] = needs
    assert {"torch", "grpcio", "mkdocs-material", "pytest", "hypothesis"} <= seen
    assert not refusing


def test_all_packages_of_the_groups_are_pinned() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    named = {
        canonicalize_name(Requirement(each).name)
        for group in groups.values()
        for each in group
        if isinstance(each, str)
    }
    assert named and named <= set(pins())
