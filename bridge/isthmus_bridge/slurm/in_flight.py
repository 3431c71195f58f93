"""Tracking of submissions under way, including those of a bridge that has died.

A program that submits inherits a lock, and holds it while it runs. Some shared file systems (Lustre without
``-o flock``, some NFS) have no locks, and a request over the network has no local process that could hold one: for such
a submission, the time by which it is over is recorded before it starts.
"""

import contextlib
import errno
import fcntl
import os
import re
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
    """Return whether a submission from this directory may be under way. Raises ``OSError``."""
    return _locked(directory / _LOCK) or time.time() < _until(directory / _UNTIL)


@contextlib.contextmanager
def guarded(directory: Path, seconds: float) -> Iterator[Sequence[int]]:
    """Mark a submission as under way while the program runs that inherits the yielded descriptors.

    Without locks, it counts as under way for ``seconds`` at most, or until the block ends normally or with
    :class:`SubmissionRefused`. Raises :class:`SubmissionRefused` before the block if the directory is not writable
    (quota exceeded, file system read-only).
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
            # If it cannot be removed, it expires.
            with contextlib.suppress(OSError):
                settle(directory)


def _take(descriptor: int) -> bool:
    """Take the lock. Return False if the file system has no locks."""
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
    """Record durably that a request is under way for at most ``seconds``. Raises ``OSError``."""
    _refuse_second(directory)
    files.replace(directory / _UNTIL, f"{time.time() + seconds:.3f}\n".encode(), 0o600, sync=True)


def settle(directory: Path) -> None:
    """Record that the request is over: its answer is known, or it was not sent."""
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
    # Unknown content does not prove that a submission is over.
    return float(text) if re.fullmatch(r"\d{1,12}\.\d{3}", text) else float("inf")
