"""Atomic replacement of files."""

import os
from contextlib import suppress
from pathlib import Path


def replace(path: Path, content: bytes, mode: int = 0o666, *, sync: bool = False) -> None:
    """Write ``content`` to ``path``, so that readers see the old or the new content and never a part of it.

    ``mode`` is subject to the umask. With ``sync``, the new content survives a power failure after this returns.
    A symbolic link at ``path`` is replaced and not followed. One process at a time may replace a path.

    Raises ``OSError``, and leaves the old file then.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
