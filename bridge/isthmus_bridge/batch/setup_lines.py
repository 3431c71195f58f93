"""Divides an environment's set-up lines into commands whose status is judged one by one."""

import functools
import re
import subprocess
from dataclasses import dataclass

# Sourcing a file by its path, without arguments: what a profile script's last test returns says nothing.
_SOURCING = re.compile(r"\s*(?:\.|source)\s+([^\s;&|<>()`#]*/[^\s;&|<>()`#]*)\s*(?:#.*)?")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Step:
    """One complete command of a set-up, which may span several lines."""

    text: str
    stage: str
    """How a failure is reported: "running set-up line 2: module purge"."""
    sourced: str = ""
    """The file that it sources, as the shell reads it: then only a file that cannot be read is a failure."""


@functools.lru_cache(maxsize=256)
def steps(lines: tuple[str, ...]) -> tuple[Step, ...]:
    """Returns the commands of a set-up in their order.

    A command ends with the first line at which bash finds it complete. What never becomes complete is one step: bash
    then reports the mistake when the task runs it.
    """
    found: list[Step] = []
    start = 0
    while start < len(lines):
        end = next((n for n in range(start + 1, len(lines) + 1) if _complete("\n".join(lines[start:n]))), len(lines))
        text = "\n".join(lines[start:end])
        match = _SOURCING.fullmatch(text)
        shown = lines[start] if len(lines[start]) <= _LONGEST_NAME else lines[start][:_LONGEST_NAME] + "…"
        found.append(Step(text, f"running set-up line {start + 1}: {shown}", match[1] if match else ""))
        start = end
    return tuple(found)


def _complete(text: str) -> bool:
    """Return whether bash would run the text as it is, rather than read on."""
    backslashes = len(text) - len(text.rstrip("\\"))
    if backslashes % 2:
        return False
    try:
        checked = subprocess.run(
            ["bash", "-n"], input=text + "\n", capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return True
    # A here-document that is not over is only warned about.
    return checked.returncode == 0 and not checked.stderr
