"""Splitting of an environment's set-up lines into commands, whose exit status the script checks one by one."""

import functools
import re
import subprocess
from dataclasses import dataclass

# Sourcing a file by its path, without arguments. The status of a profile script's last command is meaningless.
_SOURCING = re.compile(r"\s*(?:\.|source)\s+([^\s;&|<>()`#]*/[^\s;&|<>()`#]*)\s*(?:#.*)?")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Step:
    """One complete command, which may span several lines."""

    text: str
    stage: str
    """The words for a failure, such as "running set-up line 2: module purge"."""
    sourced: str = ""
    """The file that it sources, as the shell reads it. Sourcing fails only if the file cannot be read."""


@functools.lru_cache(maxsize=256)
def steps(lines: tuple[str, ...]) -> tuple[Step, ...]:
    """Return the commands of a set-up in their order.

    A command ends with the first line at which bash considers it complete. Incomplete rest is one step, whose error
    bash reports when the task runs it.
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
    """Return whether bash would run the text, instead of waiting for more lines."""
    backslashes = len(text) - len(text.rstrip("\\"))
    if backslashes % 2:
        return False
    try:
        checked = subprocess.run(
            ["bash", "-n"], input=text + "\n", capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return True
    # bash only warns about an unfinished here-document.
    return checked.returncode == 0 and not checked.stderr
