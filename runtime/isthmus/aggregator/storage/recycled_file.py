"""Reuse of a retired checkpoint's file, which the next checkpoint overwrites.

Pages that the kernel has already allocated to a file are several times as fast to write as new ones, which is most of
the cost of a large checkpoint. The allocated space also remains available when the disk is full.
"""

import fcntl
import os
import signal
from pathlib import Path

SUFFIX = ".spare"


def recycle(spare: Path, path: Path) -> None:
    """Rename the spare file, if there is one, to ``path``, where it will be overwritten. Raise ``OSError``.

    A file that is still being read is removed instead.
    """
    try:
        descriptor = os.open(spare, os.O_WRONLY)
    except FileNotFoundError:
        return
    try:
        unread = _is_ours_alone(descriptor)
    finally:
        os.close(descriptor)
    if unread:
        spare.rename(path)
    else:
        spare.unlink()  # its content stays until the readers close it


def _is_ours_alone(descriptor: int) -> bool:
    """Return whether the descriptor is the only one for the file, and no process has it mapped.

    Only then does the kernel grant a write lease (fcntl(2), "Leases"). Returns false if the system has no leases.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # A process that opens the file now breaks the lease. The default signal for that would end this process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True
