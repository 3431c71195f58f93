"""Access to files in folders where jobs may write too.

A job may replace a file by a pipe, which would block the reader, or by a link to another file: neither is followed.
"""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from isthmus_contracts.process import files


def opened(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises ``OSError``, also if it is not a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(path: Path, limit: int = 1 << 20) -> bytes:
    """Return at most ``limit`` first bytes of a regular file. Raises ``OSError``."""
    with opened(path) as file:
        return file.read(limit)


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file, replacing an existing one atomically. Raises ``OSError``."""
    files.replace(path, content, mode)


def remove_tree(path: Path) -> None:
    """Remove a folder, even if folders in it are read-only. Raises ``OSError``."""
    if path.is_symlink():
        path.unlink()
        return
    try:
        shutil.rmtree(path)
    except OSError:
        with suppress(FileNotFoundError):
            _make_tree_writable(path)
            shutil.rmtree(path)


def _make_tree_writable(path: Path) -> None:
    """Make a folder and all folders beneath writable for their owner. Follows no links, even if a folder is
    replaced."""
    make_writable(path)
    for _, names, _, folder in os.fwalk(path):
        # os.fwalk enters these folders only after this.
        for name in names:
            make_writable(name, folder)


def make_writable(name: str | Path, folder: int | None = None) -> None:
    """Set the mode of a folder to 0700, if possible."""
    with suppress(OSError):
        descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            # fchmod() does not accept an O_PATH descriptor, and other descriptors need the right to read.
            Path(f"/proc/self/fd/{descriptor}").chmod(0o700)
        finally:
            os.close(descriptor)
