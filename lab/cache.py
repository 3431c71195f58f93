"""Build results and downloads that outlive a lab, each made once."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.paths import cache_directory


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """One holder of a name at a time on this machine (of those that share the cache)."""
    directory = cache_directory() / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / name).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def folder(key: str, make: Callable[[Path], None]) -> Path:
    """The cached folder of this name, made by `make(empty folder)` when it is not there.

    It appears whole or not at all: an interrupted build leaves only scratch, which the next one removes.
    """
    directory = cache_directory()
    target = directory / key
    if target.is_dir():
        return target
    # Two labs that start together must not build twice.
    with exclusive(key):
        if target.is_dir():
            return target
        scratch = directory / f"{key}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        make(scratch)
        scratch.rename(target)
    return target
