"""Changed files lead to the checks of their packages and the tests of their folders."""

from pathlib import Path

import pytest

from tools.check_changed import commands, unit_tests


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ([], []),
        (["docs/index.md", "Makefile"], []),
        (["bridge/isthmus_bridge/slurm/rest/format.py"], ["tests/unit/bridge/slurm"]),
        (["bridge/isthmus_bridge/cli.py"], ["tests/unit/bridge"]),
        (["bridge/isthmus_bridge/cli.py", "bridge/isthmus_bridge/slurm/model.py"], ["tests/unit/bridge"]),
        (["runtime/isthmus/client/session/transfer.py"], ["tests/unit/runtime/client/session"]),
        (["contracts/isthmus_contracts/wire/pki.py"], ["tests/unit/contracts"]),
        (["tests/unit/contracts/test_files.py"], ["tests/unit/contracts/test_files.py"]),
        (["tests/unit/bridge/conftest.py"], ["tests/unit/bridge"]),
        (["tests/slurm/test_pools.py", "lab/cluster.py"], []),
    ],
)
def test_the_tests_of_changed_files(changed: list[str], tests: list[str]) -> None:
    assert unit_tests([Path(name) for name in changed]) == tests


def test_a_changed_page_needs_no_compiler() -> None:
    assert [name for name, _ in commands([Path("docs/index.md")])] == ["conventions"]


def test_only_changed_packages_are_typed() -> None:
    wanted = dict(commands([Path("lab/cluster.py"), Path("operator/isthmus_operator/app.py"), Path("README.md")]))
    assert list(wanted) == ["ruff", "format", "mypy", "layers", "conventions", "unit tests"]
    assert wanted["mypy"][2:] == ["mypy", "-p", "isthmus_operator", "-p", "lab"]
    assert wanted["ruff"][2:] == ["ruff", "check", "lab/cluster.py", "operator/isthmus_operator/app.py"]
