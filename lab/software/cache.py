"""Cache of build results and downloads, which outlives a lab."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.machine.errors import LabError
from lab.machine.paths import builds_directory, cache_directory


@contextmanager
def exclusive(name: str, directory: Path | None = None) -> Iterator[None]:
    """Hold an exclusive lock of this name, among processes that share the cache or the directory."""
    locks = (directory or cache_directory()) / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        handle = (locks / name).open("w")
    except OSError as error:
        raise LabError(
            f"the cache {locks.parent} cannot be written ({error.strerror}); "
            "set ISTHMUS_CACHE to your own folder, or correct its owner"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def folder(key: str, make: Callable[[Path], None]) -> Path:
    """Return the cached folder of this name; if it is missing, create it with `make(empty folder)`.

    The folder appears complete or not at all. The next build removes the scratch files of an interrupted one.
    """
    return _folder(cache_directory(), key, make)


def build(key: str, make: Callable[[Path], None]) -> Path:
    """Return a folder as :func:`folder` does, from a long build that is kept in :func:`builds_directory`."""
    return _folder(builds_directory(), key, make)


def _folder(directory: Path, key: str, make: Callable[[Path], None]) -> Path:
    target = directory / key
    if target.is_dir():
        return target
    # Two labs that start at the same time must not both build.
    with exclusive(key, directory):
        if target.is_dir():
            return target
        scratch = directory / f"{key}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        make(scratch)
        scratch.rename(target)
    return target
