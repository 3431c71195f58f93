"""Output of a local run: live progress in a terminal, plain lines otherwise."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import TextIOBase
from typing import Protocol, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from isthmus_contracts.text import one_line

from .output import Output
from .round_records import CommittedRound


@dataclass(frozen=True)
class PoolView:
    """The clients of one pool."""

    name: str
    kind: str
    """``cloud`` or ``hpc``, as in the manifest."""
    size: int
    running: int
    connected: int
    failed: int
    """Number of clients given up."""


@dataclass(frozen=True)
class Snapshot:
    """State of a run at one moment."""

    activity: str
    """Present activity, in a few words."""
    completed: int
    total: int
    pools: list[PoolView] = field(default_factory=list)


class View(Protocol):
    """Display of a run. Lines are kept; a snapshot replaces the previous one."""

    def info(self, line: str) -> None:
        """Print a line."""

    def warn(self, line: str) -> None:
        """Print a warning."""

    def report_round(self, done: CommittedRound) -> None:
        """Print the result of a round."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the present state."""

    def close(self) -> None:
        """End the display of snapshots; lines are still printed."""


def make_view(total: int) -> View:
    """Return the view that suits standard output."""
    err = Output(sys.stderr, lambda error: None)
    out = Output(sys.stdout, lambda error: view.warn(f"standard output: {error.strerror}; the run continues"))
    console = Console(file=cast(TextIO, out), highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    view: View = LiveView(console, total) if live else PlainView(total, out, err)
    return view


def round_line(done: CommittedRound, total: int) -> str:
    """Format a round: ``round 3/20: 4 updates, accuracy 0.9123, train_loss 0.3341, 0.52 s``."""
    parts = [f"{done.updates} update{'s' if done.updates != 1 else ''}"]
    parts += [f"{count} {what}" for count, what in ((done.late, "late"), (done.failed, "failed")) if count]
    parts += format_metrics(done.metrics)
    return f"round {done.number}/{total}: {', '.join([*parts, f'{done.seconds:.2f} s'])}"


def format_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return ``name value`` for each metric, sorted by name."""
    return [f"{one_line(name, 60)} {format_value(value)}" for name, value in sorted(metrics.items())]


def format_value(value: float) -> str:
    """Format a value with four decimals, or, if it is very large or small, four significant digits."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= math.fabs(value) < 1e4 else f"{value:.4g}"


class PlainView:
    """Lines for a pipe or a file: one per round, and one per change of activity."""

    def __init__(self, total: int, out: TextIOBase, err: TextIOBase) -> None:
        self._total = total
        self._out = out
        self._err = err
        self._activity = ""

    def info(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def warn(self, line: str) -> None:
        print(line, file=self._err, flush=True)

    def report_round(self, done: CommittedRound) -> None:
        self.info(round_line(done, self._total))

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.activity != self._activity:
            self._activity = snapshot.activity
            self.info(snapshot.activity)

    def close(self) -> None:
        self._out.flush()


class LiveView:
    """A progress bar over a table of pools, at the bottom of a terminal; rounds and events scroll above it."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._last: CommittedRound | None = None
        self._snapshot = Snapshot("", 0, total)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("rounds,"),
            TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("remaining"),
            console=console, speed_estimate_period=300,
        )  # fmt: skip
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._render, transient=True)
        self._live.start()

    def info(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        self._console.print(line, style="red", markup=False, soft_wrap=True)

    def report_round(self, done: CommittedRound) -> None:
        self._last = done
        self.info(round_line(done, self._total))

    def show(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        if not self._progress.task_ids:  # rounds of an earlier run must not count towards the speed
            self._progress.add_task("", total=self._total, completed=snapshot.completed)
        self._progress.update(self._progress.task_ids[0], completed=snapshot.completed, description=snapshot.activity)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for title in ("pool", "world"):
            table.add_column(title)
        for title in ("clients", "running", "connected", "failed"):
            table.add_column(title, justify="right")
        for pool in self._snapshot.pools:
            counts = (pool.size, pool.running, pool.connected, pool.failed)
            table.add_row(pool.name, pool.kind, *map(str, counts), style="red" if pool.failed else None)
        newest = Text(
            "   ".join(format_metrics(self._last.metrics)) if self._last else ""
        )  # a str would be parsed as markup
        return Group("", table, newest, self._progress)
