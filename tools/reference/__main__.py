"""Command line of the generator: ``python -m tools.reference DIRECTORY``."""

import sys
from pathlib import Path

from . import commands, metrics, resources, values


def main(directory: Path) -> None:
    """Write every page."""
    directory.mkdir(parents=True, exist_ok=True)
    pages = {"commands.md": commands.page(), "metrics.md": metrics.page(), "values.md": values.page()}
    for name, text in {**resources.pages(), **pages}.items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
