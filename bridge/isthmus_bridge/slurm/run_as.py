"""Running Slurm's programs as another local user: what the adapter needs of whoever can do that."""

import errno
from typing import Protocol

from .command import Result
from .model import Submission


class AsUserError(OSError):
    """It could not be done as that user. ``strerror`` is one line. ``begun``: something may have been, all the same.

    ``errors``: what a program that was ended at its time limit had written to its standard error.
    """

    def __init__(self, message: str, *, begun: bool = False, errors: str = "") -> None:
        super().__init__(errno.EIO, message)
        self.begun = begun
        self.errors = errors


class Delegate(Protocol):
    """Runs two of Slurm's programs as local users. Every method raises :class:`AsUserError`."""

    def submit(self, submission: Submission, deadline: float) -> Result:
        """Runs sbatch as the submission's user. No sbatch lives after ``deadline``, in seconds since the epoch."""
        ...

    def cancel(self, user: str, name: str, array_id: int, first: int, last: int | None) -> Result:
        """Runs scancel as that user."""
        ...
