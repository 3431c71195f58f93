"""Whether a submission from a pool's directory may still be under way, begun by this process or one that died.

A program that submits inherits a lock, which lives as long as it does. A request over the network leaves nothing here
to hold a lock: it is under way until a moment that is written down before it is sent.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from .. import plain_files
from .model import SubmissionAmbiguous

_LOCK = "sbatch.lock"
_UNTIL = "request.until"
_UNTIL_BYTES = 64


def may_run(directory: Path) -> bool:
    """Whether one may be under way. Raises ``OSError``."""
    return _locked(directory / _LOCK) or time.time() < _until(directory / _UNTIL)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """A lock that lives as long as any process that inherited it: longer than this one, where that program does."""
    _refuse_second(directory)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SubmissionAmbiguous("an earlier submission for this pool still runs") from None
        yield descriptor
    finally:
        os.close(descriptor)


def announce(directory: Path, seconds: float) -> None:
    """Writes down, durably, that a request is under way for at most so long. Raises ``OSError``."""
    _refuse_second(directory)
    fresh = directory / f"{_UNTIL}.new"
    descriptor = plain_files.created(fresh, 0o600)
    try:
        os.write(descriptor, f"{time.time() + seconds:.3f}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.replace(directory / _UNTIL)
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
    finally:
        os.close(descriptor)
    return False


def _until(path: Path) -> float:
    try:
        text = plain_files.read(path, _UNTIL_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return 0.0
    # What is not understood was written by nobody we know: it says nothing about the past.
    return float(text) if re.fullmatch(r"\d{1,12}\.\d{3}", text) else float("inf")
