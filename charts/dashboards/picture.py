"""Pictures of dashboards for the documentation, drawn from Prometheus' data roughly as Grafana draws them.

python -m charts.dashboards.picture FILE.json --prometheus http://127.0.0.1:9090 --minutes 30 --set job=digits OUT.png
"""

import argparse
import datetime as dt
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .data import QueryError, Series, Shown, Window, evaluate

_COLUMN, _ROW = 0.58, 0.3  # inches of a cell of the grid
_DPI = 72
_COLOURS = 96  # in the palette of the file
_BACKGROUND, _PANEL, _TEXT, _GRID = "#111217", "#181b1f", "#ccccdc", "#2c2f36"
_GOOD, _BAD = "#73bf69", "#f2495c"
_LINES = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d", "#ffb357", "#ca95e5")
_MAX_NAMES = 9


def draw(title: str, shown: Sequence[Shown], file: Path) -> None:
    """Write the dashboard to a PNG file."""
    mpl.rcParams.update({"font.size": 7, "text.color": _TEXT, "axes.edgecolor": _GRID, "axes.labelcolor": _TEXT})
    mpl.rcParams.update({"xtick.color": _TEXT, "ytick.color": _TEXT})
    rows = max(item.panel["gridPos"]["y"] + item.panel["gridPos"]["h"] for item in shown) + 1
    width, height = 24 * _COLUMN, rows * _ROW
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_BACKGROUND)
    figure.text(0.08 / width, 1 - 0.22 / height, title, size=11, weight="bold")
    for item in shown:
        grid = item.panel["gridPos"]
        left, top = grid["x"] * _COLUMN, (grid["y"] + 1) * _ROW
        box = (left + 0.05, height - top - grid["h"] * _ROW + 0.05, grid["w"] * _COLUMN - 0.1, grid["h"] * _ROW - 0.1)
        figure.patches.append(
            mpl.patches.Rectangle(
                (box[0] / width, box[1] / height), box[2] / width, box[3] / height,
                facecolor=_PANEL, edgecolor=_GRID, transform=figure.transFigure, zorder=-1,
            )
        )  # fmt: skip
        figure.text((box[0] + 0.08) / width, (box[1] + box[3] - 0.17) / height, item.panel["title"], weight="bold")
        if item.panel["type"] == "stat":
            _stat(figure, item, (box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            continue
        axes = figure.add_axes(
            ((box[0] + 0.55) / width, (box[1] + 0.62) / height, (box[2] - 0.95) / width, (box[3] - 0.9) / height),
            facecolor=_PANEL,
        )
        _lines(axes, item)
    _save(figure, file)


def _stat(figure: Figure, item: Shown, box: tuple[float, float, float, float]) -> None:
    steps = item.panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    series = [one for found in item.results for one in found]
    for number, one in enumerate(series):
        value = one.points[-1][1]
        colour = next(step["color"] for step in reversed(steps) if step["value"] is None or value >= step["value"])
        x = box[0] + box[2] * (number + 0.5) / len(series)
        text = _number(value, item.panel["fieldConfig"]["defaults"]["unit"])
        figure.text(x, box[1] + box[3] * 0.36, text, size=16, ha="center", color={"red": _BAD}.get(colour, _GOOD))
        if len(series) > 1:
            figure.text(x, box[1] + box[3] * 0.12, one.name, ha="center")


def _lines(axes: Axes, item: Shown) -> None:
    custom, unit = item.panel["fieldConfig"]["defaults"]["custom"], item.panel["fieldConfig"]["defaults"]["unit"]
    at_right = {override["matcher"]["options"] for override in item.panel["fieldConfig"]["overrides"]}
    left = [series for found in item.results for series in found if series.name not in at_right]
    right = [series for found in item.results for series in found if series.name in at_right]
    style: Any = "steps-post" if custom["lineInterpolation"] == "stepAfter" else "default"
    if custom["stacking"]["mode"] == "normal" and left:
        times, heights = _aligned(left)
        axes.stackplot(times, heights, colors=_LINES, alpha=0.6, labels=[series.name for series in left])
    else:
        for number, series in enumerate(left):
            _line(axes, series, _LINES[number % len(_LINES)], style)
    axes.grid(color=_GRID, linewidth=0.5)
    axes.yaxis.set_major_formatter(lambda value, _: _number(value, unit))
    axes.xaxis.set_major_formatter(
        lambda value, _: dt.datetime.fromtimestamp(value, dt.UTC).strftime("%H:%M:%S" if _short(item) else "%H:%M")
    )
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.locator_params(axis="y", nbins=5)
    if custom["stacking"]["mode"] == "normal" or all(value >= 0 for series in left for _, value in series.points):
        axes.set_ylim(bottom=0)
    if right:
        other = axes.twinx()
        for number, series in enumerate(right):
            _line(other, series, _LINES[(len(left) + number) % len(_LINES)], "steps-post")
        other.tick_params(length=0)
        other.set_ylim(bottom=0)
        axes.plot([], [], color=_LINES[len(left) % len(_LINES)], label=right[0].name)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[:_MAX_NAMES], names[:_MAX_NAMES], loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3,
        frameon=False, fontsize=6, handlelength=1, columnspacing=1,
    )  # fmt: skip


def _line(axes: Axes, series: Series, colour: str, style: Any) -> None:
    axes.plot(*zip(*series.points, strict=True), color=colour, linewidth=1.1, label=series.name, drawstyle=style)


def _aligned(lines: Sequence[Series]) -> tuple[list[float], list[list[float]]]:
    """Return the value of every series at every time; missing values are 0."""
    times = sorted({when for series in lines for when, _ in series.points})
    values = [dict(series.points) for series in lines]
    return times, [[known.get(when, 0.0) for when in times] for known in values]


def _short(item: Shown) -> bool:
    times = [when for found in item.results for series in found for when, _ in series.points]
    return bool(times) and max(times) - min(times) < 600


def _number(value: float, unit: str) -> str:
    if unit in ("bytes", "Bps"):
        for name in ("B", "kB", "MB", "GB"):
            if abs(value) < 1000 or name == "GB":
                return f"{value:.3g} {name}" + ("/s" if unit == "Bps" else "")
            value /= 1000
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        if abs(value) >= 86400:
            return f"{value / 86400:.3g} d"
        return f"{value * 1000:.3g} ms" if 0 < abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.4g}" + {"cps": " /s", "ops": " /s", "reqps": " /s"}.get(unit, "")


def _save(figure: Figure, file: Path) -> None:
    """Save with a palette, at a quarter of the size of full colour."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=_BACKGROUND)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(_COLOURS).save(file, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture. Return 0, or 1 if a panel is empty or Prometheus does not answer."""
    parser = argparse.ArgumentParser(prog="charts.dashboards.picture", description="Draw a dashboard as a PNG.")
    parser.add_argument("dashboard", type=Path, metavar="FILE.json")
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=30.0, help="how much of the past (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="VARIABLE=VALUE", help="such as job=digits")
    options = parser.parse_args(argv)
    board = json.loads(options.dashboard.read_text())
    variables = {"__rate_interval": "1m", **dict(item.split("=", 1) for item in options.set)}
    end = time.time()
    window = Window(end - 60 * options.minutes, end, max(1.0, options.minutes * 60 / 300))
    try:
        shown = evaluate(board, options.prometheus.rstrip("/"), variables, window)
    except (QueryError, OSError, KeyError) as error:
        what = f"no --set for the variable {error}" if isinstance(error, KeyError) else str(error)
        print(f"picture: {what}", file=sys.stderr)
        return 1
    draw(board["title"], shown, options.output)
    for item in shown:
        for expression in item.empty:
            print(f"picture: no data for {item.panel['title']}: {expression}", file=sys.stderr)
    return 1 if any(item.empty for item in shown) else 0


if __name__ == "__main__":
    sys.exit(main())
