"""Output of a run in a pipe and in a terminal."""

import errno
import io
import os
from pathlib import Path
from typing import TextIO, cast

import pytest
from rich.console import Console

from isthmus.local.output import Output
from isthmus.local.round_records import CommittedRound
from isthmus.local.view import LiveView, PlainView, PoolView, Snapshot, format_value, round_line


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (0.91234, "0.9123"), (12.5, "12.5000"), (3.2e-5, "3.2e-05"), (1.5e6, "1.5e+06")],
)
def test_values_are_short(value: float, text: str) -> None:
    assert format_value(value) == text


def test_a_round_is_one_line() -> None:
    line = round_line(CommittedRound(3, 0.52, 4, {"train_loss": 0.25, "accuracy": 0.9}), 20)
    assert line == "round 3/20: 4 updates, accuracy 0.9000, train_loss 0.2500, 0.52 s"
    line = round_line(CommittedRound(3, 0.52, 2, {"accuracy": 0.9}, late=1, failed=2), 20)
    assert line == "round 3/20: 2 updates, 1 late, 2 failed, accuracy 0.9000, 0.52 s"
    assert round_line(CommittedRound(1, 2.0, 1), 1) == "round 1/1: 1 update, 2.00 s"


def test_a_pipe_gets_each_activity_once_and_problems_on_the_side() -> None:
    out, err = io.StringIO(), io.StringIO()
    view = PlainView(2, out, err)
    for activity in ("starting", "starting", "training"):
        view.show(Snapshot(activity, 0, 2))
    view.report_round(CommittedRound(1, 1.0, 2))
    view.warn("oh")
    view.close()
    assert out.getvalue().splitlines() == ["starting", "training", "round 1/2: 2 updates, 1.00 s"]
    assert err.getvalue() == "oh\n"


class Torn(io.StringIO):
    """Pipe whose reader exits after the first line."""

    def __init__(self, nowhere: int) -> None:
        super().__init__()
        self._descriptor = nowhere

    def write(self, text: str) -> int:
        if "\n" in self.getvalue():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)

    def fileno(self) -> int:
        return self._descriptor


def test_a_closed_pipe_is_reported_once_and_stops_nothing(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        torn, lost = Torn(file.fileno()), list[OSError]()
        view = PlainView(9, Output(torn, lost.append), io.StringIO())
        for number in range(1, 10):
            view.report_round(CommittedRound(number, 1.0, 2))
        view.close()
        os.write(file.fileno(), b"what the stream still held")
    assert torn.getvalue().startswith("round 1/9")
    assert [error.strerror for error in lost] == ["Broken pipe"]
    assert (tmp_path / "out").read_bytes() == b""  # Python's last flush does not fail again


def test_a_terminal_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        lost: list[OSError] = []
        screen = cast(TextIO, Output(Torn(file.fileno()), lost.append))
        view = LiveView(Console(file=screen, force_terminal=True, width=120, highlight=False), 9)
        for number in range(1, 10):
            view.show(Snapshot("training", number, 9))
            view.report_round(CommittedRound(number, 1.0, 2))
        view.close()
    assert len(lost) == 1


def test_a_terminal_gets_a_bar_and_a_table() -> None:
    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=120, highlight=False), 20)
    pools = [PoolView("cloud", "cloud", 2, 2, 1, 0), PoolView("lumi", "hpc", 4, 3, 3, 1)]
    view.show(Snapshot("training", 7, 20, pools))
    view.report_round(CommittedRound(7, 1.0, 5, {"accuracy": 0.875}))
    view.warn("lumi-3 is [given] up")
    view.close()
    text = screen.getvalue()
    for part in ("training", "7/20", "cloud", "lumi", "accuracy 0.8750", "lumi-3 is [given] up", "remaining"):
        assert part in text


def test_names_from_outside_are_neither_markup_nor_escapes() -> None:
    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=120, highlight=False), 20)
    view.show(Snapshot("[red]waiting[/blue]", 7, 20, []))
    view.report_round(CommittedRound(7, 1.0, 5, {"[/bold]x": 0.5, "a\x1b]0;owned\x07\nb": 0.25}))
    view.close()
    text = screen.getvalue()
    assert "[/bold]x 0.5000" in text and "[red]waiting[/blue]" in text
    assert "a ]0;owned b 0.2500" in text and "\x1b]0;" not in text
