"""Quick checks of the changed files: ``python -m tools.check_changed [BASE]``, as ``make check`` does.

Changed are the files that differ from the merge base with BASE (default: main), and untracked ones. Runs ruff, mypy of
the changed packages, the import layers, the repository's checks, and the unit tests of the changed folders.
"""

import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folder of a package -> (name for mypy, its unit tests).
PACKAGES = {
    "contracts": ("isthmus_contracts", "contracts"),
    "runtime": ("isthmus", "runtime"),
    "bridge": ("isthmus_bridge", "bridge"),
    "operator": ("isthmus_operator", "operator"),
    "examples": ("isthmus_examples", "examples"),
    "bench": ("bench", "bench"),
    "tools": ("tools", "tools"),
    "lab": ("lab", ""),
    "charts": ("charts", ""),
}
UNIT = Path("tests/unit")


def main() -> int:
    """Run the checks in turn; return 1 if one of these fails."""
    base = sys.argv[1] if len(sys.argv) > 1 else "main"
    files = changed(base)
    failed = []
    for name, command in commands(files):
        started = time.monotonic()
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"check: {name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    for name in failed:
        print(f"check: {name} failed", file=sys.stderr)
    return 1 if failed else 0


def changed(base: str) -> list[Path]:
    """Return the existing files that differ from the merge base with ``base``, and untracked ones."""
    names = _git("diff", "--name-only", "--merge-base", base) + _git("ls-files", "--others", "--exclude-standard")
    return sorted({Path(name) for name in names if (ROOT / name).is_file()})


def commands(files: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Return the checks for these files: name and command line."""
    modules = [str(path) for path in files if path.suffix == ".py"]
    wanted: list[tuple[str, list[str]]] = []
    if modules:
        wanted.append(("ruff", _python("ruff", "check", *modules)))
        wanted.append(("format", _python("ruff", "format", "--check", *modules)))
    names = sorted({PACKAGES[path.parts[0]][0] for path in files if path.suffix == ".py" and path.parts[0] in PACKAGES})
    if names:
        wanted.append(("mypy", _python("mypy", *(part for name in names for part in ("-p", name)))))
    if modules:
        linter = str(Path(sys.executable).with_name("lint-imports"))
        wanted.append(("layers", [linter, "--no-logo", "--cache-dir", ".mypy_cache/imports"]))
    wanted.append(("conventions", _python("tools.checks")))
    if tests := unit_tests(files):
        wanted.append(("unit tests", _python("pytest", "-q", "-n", "auto", "--dist", "loadfile", *tests)))
    return wanted


def unit_tests(files: Iterable[Path]) -> list[str]:
    """Return the changed unit tests, and for changed modules the tests of their folder or else of their package."""
    found = set()
    for path in files:
        if path.suffix != ".py":
            continue
        if path.is_relative_to(UNIT):
            found.add(path if path.name.startswith("test_") else path.parent)
        elif path.parts[0] in PACKAGES and PACKAGES[path.parts[0]][1]:
            package = UNIT / PACKAGES[path.parts[0]][1]
            folders = [package.joinpath(*path.parts[2:end]) for end in range(len(path.parts) - 1, 1, -1)]
            found.add(next((folder for folder in folders if (ROOT / folder).is_dir()), package))
    return [str(path) for path in sorted(found) if not any(other in path.parents for other in found)]


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _git(*arguments: str) -> list[str]:
    output = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return output.splitlines()


if __name__ == "__main__":
    sys.exit(main())
