"""Multi-process launchers (torchrun, accelerate), whose failure reports hide the script's error."""

import re
from collections.abc import Sequence

_TRACEBACK = "Traceback (most recent call last)"
# Files of the launchers' code, as in a traceback.
_LAUNCHING = ("torch/distributed/launcher/", "accelerate/commands/")
# Lines that torchrun's agent logs after the script has ended.
_AGENT = re.compile(r"torch[./]distributed[./]elastic")
# An exception's line in a traceback, or alone. PyTorch puts the rank before it.
_RAISED = re.compile(r"(\[rank\d+\]: ?)?[A-Za-z_][\w.]*(Error|Exception|Interrupt)(:|$)")


def script_lines(lines: Sequence[str]) -> Sequence[str]:
    """Return a log's lines without a launcher's failure report at the end.

    The report is kept if no earlier line gives a reason, since it has the exit codes.
    """
    for start, line in enumerate(lines):
        if line.startswith(_TRACEBACK) and _is_launchers(lines[start + 1 :]):
            end = start
            while end and (_AGENT.search(lines[end - 1]) or not lines[end - 1].strip()):
                end -= 1
            return lines[:end] if any(_RAISED.match(each) for each in lines[:end]) else lines
    return lines


def _is_launchers(lines: Sequence[str]) -> bool:
    """Return True if the traceback with these lines contains a launcher's code."""
    for line in lines:
        if not line.startswith(" "):
            return False
        if any(part in line for part in _LAUNCHING):
            return True
    return False
