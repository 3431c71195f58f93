"""Words for people: short, printable, bounded."""

import re

from isthmus_contracts import text as _text
from isthmus_contracts.text import one_line

__all__ = ["exited", "headline", "killed", "last_lines", "one_line", "plural"]

_MAX = 1000


def last_lines(text: str, count: int = 8, limit: int = _MAX) -> str:
    """Return the last lines that are not empty, printable, cut at the front to a length."""
    return _text.last_lines(text, count, limit)


def plural(count: int, noun: str) -> str:
    """``1 client``, ``2 clients``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def headline(words: str) -> str:
    """Return the first part of a reason, up to a colon and without numbers: what stays while details change."""
    return re.sub(r"[0-9]+", "", words.partition(": ")[0])


def exited(exit_code: int | None) -> str:
    """Return words for an exit code, for where there are no others."""
    return "the cluster gives no reason" if exit_code is None else f"exit code {exit_code}"


def killed(exit_code: int | None) -> str:
    """What an exit code tells of a SIGKILL; empty for others. Not every runtime notices that it was the OOM killer's:
    one that hit a process below the container's first is reported as an ordinary error."""
    return "killed (exit code 137), perhaps out of memory" if exit_code == 137 else ""
