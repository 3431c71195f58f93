"""Finds out if a submission from a pool's directory may still be under way, begun by this process or one that died.

A program that submits inherits a lock, which lives as long as it does. Some shared file systems (Lustre without
``-o flock``, some NFS) have no locks, and a request over the network leaves nothing here to hold one: such a submission
is under way until a moment that is written down before it begins.
"""

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus_contracts.process import files

from ..files import untrusted_files
from .model import Patience, SubmissionAmbiguous, SubmissionRefused

_LOCK = "sbatch.lock"
_UNTIL = "request.until"
_UNTIL_BYTES = 64
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})


def may_run(directory: Path) -> bool:
    """Return whether one may be under way. Raises ``OSError``."""
    return _locked(directory / _LOCK) or time.time() < _until(directory / _UNTIL)


@contextlib.contextmanager
def guarded(directory: Path, seconds: float) -> Iterator[Sequence[int]]:
    """TaskMarker a submission as under way, for as long as the program lives that inherits the yielded descriptors.

    Where the file system has no locks it is under way for at most ``seconds``, unless the block ends before by itself
    or with :class:`SubmissionRefused`. Raises that, before the block begins, where nothing can be written: the quota is
    used up, or the file system read-only.
    """
    try:
        _refuse_second(directory)
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            has_locks = _take(descriptor)
            if not has_locks:
                announce(directory, seconds)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise SubmissionRefused(f"cannot write in {directory}: {error.strerror}", Patience.QUEUE) from None
    over = has_locks
    try:
        yield [descriptor] if has_locks else []
        over = True
    except SubmissionRefused:
        over = True
        raise
    finally:
        os.close(descriptor)
        if over and not has_locks:
            # Where it cannot be removed it expires.
            with contextlib.suppress(OSError):
                settle(directory)


def lockable(directory: Path) -> bool:
    """Return whether the file system of a folder has locks. Raises ``OSError`` where no file can be made in it."""
    with tempfile.TemporaryFile(dir=directory) as file:
        return _take(file.fileno())


def _take(descriptor: int) -> bool:
    """Takes the lock. Returns False where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SubmissionAmbiguous("an earlier submission for this pool still runs") from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def announce(directory: Path, seconds: float) -> None:
    """Writes down, durably, that a request is under way for at most so long. Raises ``OSError``."""
    _refuse_second(directory)
    files.replace(directory / _UNTIL, f"{time.time() + seconds:.3f}\n".encode(), 0o600, sync=True)


def settle(directory: Path) -> None:
    """The request is over: its answer is known, or it was never sent."""
    (directory / _UNTIL).unlink(missing_ok=True)


def _refuse_second(directory: Path) -> None:
    if may_run(directory):
        raise SubmissionAmbiguous("an earlier submission for this pool still runs")


def _locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return False


def _until(path: Path) -> float:
    try:
        text = untrusted_files.read(path, _UNTIL_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return 0.0
    # What is not understood was written by nobody we know: it says nothing about the past.
    return float(text) if re.fullmatch(r"\d{1,12}\.\d{3}", text) else float("inf")
