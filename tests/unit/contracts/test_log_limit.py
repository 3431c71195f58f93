"""Callers cannot fill the log."""

import logging
import time

import pytest

from isthmus_contracts.process import log_limit
from isthmus_contracts.process.log_limit import BURST, LogLimit


def record(text: str, level: int = logging.WARNING, argument: object = 0) -> logging.LogRecord:
    return logging.LogRecord("a", level, __file__, 1, text, (argument,), None)


def test_a_flood_of_one_kind_is_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = LogLimit()
    assert sum(limit.filter(record("refused: %s", argument=number)) for number in range(10_000)) == BURST
    # It does not hold up other lines. Errors are a kind of their own, with the same bound.
    assert limit.filter(record("joined: %s"))
    assert sum(limit.filter(record("refused: %s", logging.ERROR)) for _ in range(2 * BURST)) == BURST
    now += 10
    passed = [line for number in range(1000) if limit.filter(line := record("refused: %s", argument=number))]
    assert len(passed) == 10 * log_limit.PER_SECOND
    assert passed[0].getMessage() == f"refused: 0 ({10_000 - BURST} more like it were left out)"
    assert passed[1].getMessage() == "refused: 1"


def test_a_text_with_percent_signs_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_limit, "BURST", 1)
    monkeypatch.setattr(log_limit, "PER_SECOND", 1e9)
    limit = LogLimit()
    limit._kinds[("a", logging.WARNING, "%s")] = (1.0, 0.0, 3)
    line = record("%s", argument="100 %s")
    assert limit.filter(line) and line.getMessage() == "100 %s (3 more like it were left out)"
