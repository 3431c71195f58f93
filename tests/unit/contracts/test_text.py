"""Untrusted text that is written to logs, statuses and terminals."""

from hypothesis import given
from hypothesis import strategies as st

from isthmus_contracts.text import last_lines, one_line, shown_line


@given(st.text(), st.integers(10, 400))
def test_a_line_is_printable_and_bounded(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable() and len(line) <= limit


@given(st.text(), st.integers(10, 400))
def test_lines_are_printable_and_bounded(text: str, limit: int) -> None:
    lines = last_lines(text, 8, limit)
    assert len(lines) <= limit and all(line.isprintable() for line in lines.split("\n"))


def test_no_line_can_be_forged() -> None:
    forged = "acc\n2026 INFO round 9 committed\x1b[2J\x1b]0;owned\x07\u2028\u202etxt\r."
    assert one_line(forged) == "acc 2026 INFO round 9 committed [2J ]0;owned txt ."
    assert one_line("  a\tb  ") == "a b"
    assert one_line("x" * 400) == "x" * 297 + "..."
    assert one_line(" " * 5000 + "late") == "..."


def test_the_end_of_a_traceback_is_kept() -> None:
    assert last_lines("a\n\n  b\x1b[31m\nc", 2, 100) == "  b [31m\nc"
    assert last_lines("x" * 200 + "end", 8, 20) == "..." + "x" * 14 + "end"


@given(st.text(), st.integers(10, 400))
def test_a_shown_line_is_printable_and_bounded(text: str, limit: int) -> None:
    line = shown_line(text, limit)
    assert line.isprintable() and len(line) <= limit


def test_a_shown_line_keeps_its_spaces() -> None:
    assert shown_line("    raise  E\x1b[31m\t") == "    raise  E [31m"
    assert shown_line("x" * 300) == "x" * 300
    assert shown_line("x" * 5000) == "x" * 297 + "..."
