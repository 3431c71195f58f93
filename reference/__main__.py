"""Writes the generated pages: ``python -m reference DIRECTORY``."""

import sys
from pathlib import Path

from . import commands, metrics, resources


def main(directory: Path) -> None:
    """Writes every page."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in {**resources.pages(), "commands.md": commands.page(), "metrics.md": metrics.page()}.items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
