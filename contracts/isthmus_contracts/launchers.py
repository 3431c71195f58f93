"""Launchers of several processes (torchrun, accelerate), whose reports hide why the script failed."""

import re
from collections.abc import Sequence

_TRACEBACK = "Traceback (most recent call last)"
# Files of the launchers' own code, as a traceback names them.
_LAUNCHING = ("torch/distributed/launcher/", "accelerate/commands/")
# torchrun's agent logs between the script's end and its own.
_AGENT = re.compile(r"torch[./]distributed[./]elastic")
# An exception's line in a traceback, or alone. PyTorch puts the rank before it.
_RAISED = re.compile(r"(\[rank\d+\]: ?)?[A-Za-z_][\w.]*(Error|Exception|Interrupt)(:|$)")


def script_lines(lines: Sequence[str]) -> Sequence[str]:
    """Return a log's lines without the report at its end in which a launcher says that the script failed.

    A report stays where nothing before it says why: it has the exit codes.
    """
    for start, line in enumerate(lines):
        if line.startswith(_TRACEBACK) and _is_launchers(lines[start + 1 :]):
            end = start
            while end and (_AGENT.search(lines[end - 1]) or not lines[end - 1].strip()):
                end -= 1
            return lines[:end] if any(_RAISED.match(each) for each in lines[:end]) else lines
    return lines


def _is_launchers(lines: Sequence[str]) -> bool:
    """Return whether the traceback with these lines goes through a launcher's code."""
    for line in lines:
        if not line.startswith(" "):
            return False
        if any(part in line for part in _LAUNCHING):
            return True
    return False
