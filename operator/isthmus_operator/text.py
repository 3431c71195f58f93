"""Words for people: short, printable, bounded."""

_MAX = 1000


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, cut to a length."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."


def last_lines(text: str, count: int = 8, limit: int = _MAX) -> str:
    """The last lines that say something, cut at the front to a length."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    result = "\n".join(lines[-count:])
    return result if len(result) <= limit else "..." + result[-(limit - 3) :]


def plural(count: int, noun: str) -> str:
    """``1 client``, ``2 clients``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
