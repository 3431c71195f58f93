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


def killed(exit_code: int | None) -> str:
    """What an exit code tells of a SIGKILL; empty for others. Not every runtime notices that it was the OOM killer's:
    one that hit a process below the container's first is reported as an ordinary error."""
    return "killed (exit code 137), perhaps out of memory" if exit_code == 137 else ""
