"""Files where jobs may write too: what a job has put in a file's place must neither hold the bridge up nor lead it off.

A pipe would keep whoever opens it waiting, and a link may lead anywhere.
"""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from isthmus_contracts.process import files


def opened(path: Path) -> BinaryIO:
    """A regular file, to be read. Raises ``OSError``, also for whatever is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(path: Path, limit: int = 1 << 20) -> bytes:
    """A regular file's first bytes. Raises ``OSError``."""
    with opened(path) as file:
        return file.read(limit)


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Puts a file in its place at once, whatever is there. Raises ``OSError``."""
    files.replace(path, content, mode)


def remove_tree(path: Path) -> None:
    """Removes a folder, those in it that were made read-only included. Raises ``OSError``."""
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
    """Lets its owner change all folders beneath; through no link, whatever takes a folder's place meanwhile."""
    make_writable(path)
    for _, names, _, folder in os.fwalk(path):
        # Those are entered only now.
        for name in names:
            make_writable(name, folder)


def make_writable(name: str | Path, folder: int | None = None) -> None:
    """Lets its owner do anything in a folder, where that is possible."""
    with suppress(OSError):
        descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            # fchmod() takes no such descriptor, and any other needs the right to read.
            Path(f"/proc/self/fd/{descriptor}").chmod(0o700)
        finally:
            os.close(descriptor)
