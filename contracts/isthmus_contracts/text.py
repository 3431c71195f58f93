"""Untrusted text, made printable and bounded for logs, statuses and terminals."""

from .launchers import script_lines

_LINE = 300
# Maximum length of a launcher's report on many processes. Characters.
_REPORT = 16_384
_CUT = "..."


def one_line(text: str, limit: int = _LINE) -> str:
    """Return the text on one line of printable characters, cut to ``limit`` characters.

    Line ends, terminal escapes and other control or formatting characters become spaces; runs of spaces become one.
    Only the beginning of a huge text is read.
    """
    head = text[: 4 * limit]
    line = " ".join(_printable(head).split())
    whole = len(line) <= limit and len(head) == len(text)
    return line if whole else line[: limit - len(_CUT)] + _CUT


def shown_line(line: str, limit: int = _LINE) -> str:
    """Return one line of a log for a terminal: printable, cut to ``limit`` characters, with its spaces."""
    shown = _printable(line[: limit + 1]).rstrip()
    return shown if len(shown) <= limit else shown[: limit - len(_CUT)] + _CUT


def last_lines(text: str, count: int, limit: int) -> str:
    """Return the last ``count`` lines that are not empty, each printable, cut at the front to ``limit`` characters.

    Indentation is kept, so that tracebacks stay readable. A launcher's report after a traceback is removed.
    """
    tail = text[-max(4 * limit, _REPORT) :]
    lines = [_printable(line).rstrip() for line in script_lines(tail.splitlines())]
    result = "\n".join([line for line in lines if line][-count:])
    whole = len(result) <= limit
    return result if whole else _CUT + result[-(limit - len(_CUT)) :]


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
