"""What a script's uncaught exceptions look like."""

import sys
import threading

import pytest

from isthmus.client.process import ProcessWatch, end_without_trace, last_lines
from isthmus.client.replicas import RankGoneError
from isthmus.client.session import FederationError

MISFIT = FederationError("the global model does not fit:\nsize mismatch for weight")


def shown(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    sys.excepthook(type(error), error, None)
    return capsys.readouterr().err


def test_an_error_of_the_federation_is_what_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: others.append(error))
    for _ in range(2):
        end_without_trace()
    assert (
        shown(MISFIT, capsys) == "isthmus.FederationError: the global model does not fit:\nsize mismatch for weight\n"
    )
    assert shown(RankGoneError("rank 1 has gone"), capsys) == "isthmus.RankGoneError: rank 1 has gone\n"
    assert shown(error := ValueError("no column"), capsys) == ""
    assert others == [error]


def test_so_it_is_where_it_comes_from_submit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[BaseException] = []
    reported: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: others.append(error))
    watch = ProcessWatch(threading.Event(), reported.append, lambda: None)
    error = ValueError("no column")
    assert shown(MISFIT, capsys).startswith("isthmus.FederationError: the global model does not fit:")
    assert shown(error, capsys) == ""
    watch.end()
    assert reported == [MISFIT, error]
    assert others == [error]


def test_what_is_reported() -> None:
    assert last_lines(MISFIT) == "FederationError: the global model does not fit:\nsize mismatch for weight"
    try:
        raise ValueError("no column")
    except ValueError as error:
        assert last_lines(error).startswith("Traceback")
