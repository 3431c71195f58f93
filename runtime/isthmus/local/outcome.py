"""Outcomes of a local run and of its processes."""

import signal

EXIT_COMPLETE, EXIT_FAILED = 0, 1


class RunFailed(Exception):
    """The run cannot continue. ``str()`` is one line."""


class Interrupted(Exception):
    """A signal ended the run."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def reason(code: int) -> str:
    """Describe an exit code; a negative one is the number of a signal."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
