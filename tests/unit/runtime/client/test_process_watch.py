"""Output and report of a script's uncaught exceptions."""

import os
import signal
import sys
import threading

import pytest

from isthmus.client.errors import FederationError
from isthmus.client.loop.process_watch import ProcessWatch, error_line, hide_federation_tracebacks, traceback_tail
from isthmus.client.loop.ranks import RankGoneError
from isthmus_contracts.pb import federation_pb2 as pb

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
        hide_federation_tracebacks()
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
    watch = ProcessWatch(threading.Event(), reported.append, lambda: None, lambda: None)
    error = ValueError("no column")
    assert shown(MISFIT, capsys).startswith("isthmus.FederationError: the global model does not fit:")
    assert shown(error, capsys) == ""
    watch.end()
    assert reported == [MISFIT, error]
    assert others == [error]


def test_the_reported_end_of_a_traceback() -> None:
    assert traceback_tail(MISFIT) == "FederationError: the global model does not fit:\nsize mismatch for weight"
    try:
        raise ValueError("no column")
    except ValueError as error:
        assert traceback_tail(error).startswith("Traceback")


def test_a_fork_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM)
    told: list[str] = []
    watch = ProcessWatch(
        threading.Event(), lambda error: told.append("report"), lambda: told.append("close"), lambda: told.append("up")
    )
    own = sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM)
    if (child := os.fork()) == 0:
        clean = (sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM)) == hooks
        watch.leave()
        watch._at_exit()
        os._exit(0 if clean and told == ["up"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM)) == own != hooks
    watch.end()
    assert told == []


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyError("no message")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("caf\udce9 broke"), "RuntimeError: caf\\udce9 broke"),
        (Mute(), "Mute: (its str() raises KeyError)"),
        (ValueError("x" * 5000), "ValueError: " + "x" * 988),
        (ValueError(), "ValueError: "),
        (OSError(2, "No such file", "na\udcffme"), "OSError: [Errno 2] No such file: 'na\\udcffme'"),
    ],
)
def test_every_failure_can_be_reported(error: Exception, line: str) -> None:
    assert error_line(error).replace("FileNotFoundError", "OSError") == line
    try:
        raise error
    except Exception as raised:
        trace = traceback_tail(raised)
    failure = pb.Failure(message=error_line(error), traceback=trace)
    assert pb.Failure.FromString(failure.SerializeToString()) == failure
    assert max(map(len, trace.splitlines())) <= 1000
