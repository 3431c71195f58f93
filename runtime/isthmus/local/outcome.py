"""How a local run, and a process of it, may end."""

import signal

EXIT_COMPLETE, EXIT_FAILED = 0, 1


class RunFailed(Exception):
    """The run cannot go on. ``str()`` is one line."""


class Interrupted(Exception):
    """A signal ended the run."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def reason(code: int) -> str:
    """An exit code in words; a negative one is a signal's number."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
