"""The lab's one kind of failure, and its way of telling progress."""

from __future__ import annotations

import sys


class LabError(Exception):
    """Something the user can read in one line and mend."""


def say(message: str) -> None:
    """Print one progress line; standard error, so that `env` and `exec` keep standard output to themselves."""
    print(f"lab: {message}", file=sys.stderr, flush=True)
