"""Error class and progress output of the lab."""

from __future__ import annotations

import sys


class LabError(Exception):
    """A failure described in one line, with a way to fix it."""


def say(message: str) -> None:
    """Print one progress line; standard error, so that `env` and `exec` keep standard output to themselves."""
    print(f"lab: {message}", file=sys.stderr, flush=True)
