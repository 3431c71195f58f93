"""Short, printable and bounded texts for users."""

import re

from isthmus_contracts import text as _text
from isthmus_contracts.text import one_line

__all__ = ["exited", "headline", "killed", "last_lines", "one_line", "plural"]

_MAX = 1000


def last_lines(text: str, count: int = 8, limit: int = _MAX) -> str:
    """Return the last non-empty lines, made printable and cut at the front to ``limit`` characters."""
    return _text.last_lines(text, count, limit)


def plural(count: int, noun: str) -> str:
    """Return the count with its noun: ``1 client``, ``2 clients``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def headline(words: str) -> str:
    """Return a reason up to its first colon and without numbers: the part that stays while details change."""
    return re.sub(r"[0-9]+", "", words.partition(": ")[0])


def exited(exit_code: int | None) -> str:
    """Describe an exit code, for use when there is no other message."""
    return "the cluster gives no reason" if exit_code is None else f"exit code {exit_code}"


def killed(exit_code: int | None) -> str:
    """Describe an exit code that stands for SIGKILL; return an empty string for others.

    Not every runtime reports an OOM kill as such: if it hit a child process, it looks like an ordinary error.
    """
    return "killed (exit code 137), perhaps out of memory" if exit_code == 137 else ""
