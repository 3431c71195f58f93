"""The interface for running Slurm's programs as another local user."""

import errno
from typing import Protocol

from .command import Result
from .model import Submission


class AsUserError(OSError):
    """An operation as another user failed. ``strerror`` is one line.

    ``begun``: the operation may have been executed all the same. ``errors``: the standard error of a program that was
    killed at its time limit.
    """

    def __init__(self, message: str, *, begun: bool = False, errors: str = "") -> None:
        super().__init__(errno.EIO, message)
        self.begun = begun
        self.errors = errors


class Delegate(Protocol):
    """Access to Slurm's programs as local users. Every method raises :class:`AsUserError`."""

    def submit(self, submission: Submission, deadline: float) -> Result:
        """Run sbatch as the submission's user. It has ended by ``deadline``, in seconds since the epoch."""
        ...

    def cancel(self, user: str, name: str, array_id: int, first: int, last: int | None) -> Result:
        """Run scancel as that user."""
        ...
