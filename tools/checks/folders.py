"""Limit on the number of modules in a folder."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

MAX_MODULES = 15


def crowded(modules: Iterable[Path]) -> list[str]:
    """Return a message for each folder with more than :data:`MAX_MODULES` modules; ``__init__.py`` does not count."""
    counts = Counter(path.parent for path in modules if path.name != "__init__.py")
    return [
        f"{folder}: {count} modules, at most {MAX_MODULES} allowed: split the folder by subject"
        for folder, count in sorted(counts.items())
        if count > MAX_MODULES
    ]
