"""Run the checks on the repository: ``python -m tools.checks``. Exits with 1 if one fails."""

import sys
from collections.abc import Iterator
from pathlib import Path

from . import folders, prose

ROOT = Path(__file__).resolve().parents[2]
# The tests are left out of the limit on modules: each of their folders is one suite.
CODE = ("contracts", "runtime", "bridge", "operator", "examples", "lab", "bench", "tools", "charts", "images")
# Generated files are checked where they come from.
GENERATED = ("contracts/isthmus_contracts/pb", "docs/reference")
BUILT = ("build", "dist", "__pycache__")
CHECKED_PROSE = (
    "bench",
    "bridge",
    "charts",
    "contracts",
    "docs",
    "examples",
    "images",
    "lab",
    "operator",
    "runtime",
    "tests",
    "tools",
)


def main() -> int:
    """Print each fault as ``FILE:LINE: message`` and return the exit code."""
    faults = folders.crowded(path for path in files(*CODE) if path.suffix == ".py")
    for path in files(*CHECKED_PROSE):
        text = (ROOT / path).read_text(encoding="utf-8")
        found = prose.of_python(text) if path.suffix == ".py" else prose.of_text(text)
        faults += [f"{path}:{fault.line}: {fault.text}" for fault in found]
    print("\n".join(faults), end="\n" if faults else "")
    return 1 if faults else 0


def files(*places: str) -> Iterator[Path]:
    """Yield the Python modules and pages in ``places``, as paths from the repository's root."""
    for place in places:
        for path in sorted((ROOT / place).rglob("*")):
            name = path.relative_to(ROOT)
            hidden = any(part.startswith(".") or part in BUILT for part in name.parts)
            if path.suffix in (".py", ".md") and not hidden and not any(map(name.is_relative_to, GENERATED)):
                yield name


if __name__ == "__main__":
    sys.exit(main())
