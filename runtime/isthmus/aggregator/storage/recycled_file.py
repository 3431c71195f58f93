"""The file of a checkpoint that is not needed any more, written over by the next one.

Pages that the kernel has for a file already are several times as quick to write as new ones: most of what a checkpoint
of a large model costs. And room that is taken is there when the disk is full.
"""

import fcntl
import os
import signal
from pathlib import Path

SUFFIX = ".spare"


def recycle(spare: Path, path: Path) -> None:
    """Gives the spare file, if there is one, a new name, to be written over; not if somebody still reads it. Raises
    ``OSError``."""
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
        spare.unlink()  # it is gone once they have read it


def _is_ours_alone(descriptor: int) -> bool:
    """Whether nobody else has the file open or mapped, this process included: only then does the kernel grant a write
    lease (fcntl(2), "Leases"). Where it cannot tell, somebody may."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # Whoever opens it in between breaks the lease, and the signal of that ends a process unless it is another one.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True
