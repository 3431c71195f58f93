"""Data of a dashboard: its queries, sent to a Prometheus as Grafana sends them."""

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TIMEOUT = 30.0


class QueryError(Exception):
    """Prometheus refused a query. ``str()`` names the query and Prometheus' reason."""


@dataclass(frozen=True)
class Window:
    """Time range (Unix seconds) and distance of its points (seconds)."""

    start: float
    end: float
    step: float


@dataclass(frozen=True)
class Series:
    """One series: its name in the legend, and points (Unix seconds, value) without NaN."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Shown:
    """A panel with the results of its queries, in their order."""

    panel: Mapping[str, Any]
    results: tuple[tuple[Series, ...], ...]

    @property
    def empty(self) -> list[str]:
        """Expressions without a result."""
        targets = self.panel["targets"]
        return [target["expr"] for target, found in zip(targets, self.results, strict=True) if not found]


def evaluate(
    dashboard: Mapping[str, Any], address: str, variables: Mapping[str, str], window: Window
) -> tuple[Shown, ...]:
    """Evaluate every query of a dashboard. ``variables`` has the dashboard's variables and ``__rate_interval``.

    Stats are evaluated at the end of the window. Raises :class:`QueryError`, ``OSError``.
    """
    return tuple(
        Shown(
            panel,
            tuple(
                _ask(
                    address, _filled(target["expr"], variables), target["legendFormat"], bool(target["instant"]), window
                )
                for target in panel["targets"]
            ),
        )
        for panel in dashboard["panels"]
    )


def _filled(expression: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: variables[match[1]], expression)


def _ask(address: str, expression: str, legend: str, instant: bool, window: Window) -> tuple[Series, ...]:
    if instant:
        path, arguments = "query", {"query": expression, "time": f"{window.end:.3f}"}
    else:
        arguments = {
            "query": expression,
            "start": f"{window.start:.3f}",
            "end": f"{window.end:.3f}",
            "step": f"{window.step:g}",
        }
        path = "query_range"
    url = f"{address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310 - an address that the caller chose
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        raise QueryError(f"{expression}: {reason}") from None
    named = (Series(_name(legend, item["metric"]), _points(item)) for item in found)
    return tuple(sorted((series for series in named if series.points), key=lambda series: series.name))


def _points(item: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    values = item["values"] if "values" in item else [item["value"]]
    points = ((float(when), float(value)) for when, value in values)
    return tuple((when, value) for when, value in points if math.isfinite(value))


def _name(legend: str, labels: Mapping[str, str]) -> str:
    if legend == "__auto":
        return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != "__name__")
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), legend)
