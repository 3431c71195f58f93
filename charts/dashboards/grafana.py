"""The part of Grafana's dashboard model that the dashboards use: schema version 41 (Grafana 12)."""

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 41
WIDTH = 24  # columns of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]
Kind = Literal["timeseries", "stat"]


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series (``{{label}}`` stands for a label's value)."""

    expr: str
    legend: str = ""
    right: bool = False
    """Drawn as steps, at an axis of its own."""


@dataclass(frozen=True)
class Panel:
    """One panel. ``unit`` is Grafana's identifier; ``width`` is in columns of 24."""

    title: str
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    width: int = 8
    stacked: bool = False
    steps: bool = False
    bad_above: float | None = None
    """From here on a stat is red."""
    bad_below: float | None = None

    @property
    def height(self) -> int:
        """Height in rows of the grid."""
        return 4 if self.kind == "stat" else 8


@dataclass(frozen=True)
class Variable:
    """A selection at the top of the dashboard: the values of a label of a metric."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Dashboard:
    """A dashboard: rows of panels, from left to right."""

    uid: str
    title: str
    description: str
    panels: tuple[Panel, ...]
    variables: tuple[Variable, ...] = field(default=())
    since: str = "now-3h"

    def json(self) -> Json:
        """Return the JSON that Grafana imports."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["isthmus"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": self.since, "to": "now"},
            "timezone": "browser",
            "templating": {"list": [_datasource(), *(_variable(variable) for variable in self.variables)]},
            "links": [
                {
                    "title": "Isthmus",
                    "type": "dashboards",
                    "tags": ["isthmus"],
                    "asDropdown": True,
                    "includeVars": True,
                    "keepTime": True,
                }
            ],
            "annotations": {"list": []},
            "panels": _placed(self.panels),
        }


def _placed(panels: tuple[Panel, ...]) -> list[Json]:
    placed, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > WIDTH:
            x, y, row = 0, y + row, 0
        placed.append({"id": number, "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height}, **_panel(panel)})
        x, row = x + panel.width, max(row, panel.height)
    return placed


def _panel(panel: Panel) -> Json:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": panel.kind == "stat",
                "range": panel.kind != "stat",
            }
            for number, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": [_at_right(q) for q in panel.queries if q.right]},
        "options": _STAT_OPTIONS if panel.kind == "stat" else _TIMESERIES_OPTIONS,
    }


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _thresholds(panel)}}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineInterpolation": "stepAfter" if panel.steps else "linear",
            "lineWidth": 1,
            "fillOpacity": 25 if panel.stacked else 5,
            "showPoints": "auto",
            "spanNulls": True,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return defaults


def _thresholds(panel: Panel) -> list[Json]:
    if panel.bad_below is not None:
        return [{"color": "red", "value": None}, {"color": "green", "value": panel.bad_below}]
    steps: list[Json] = [{"color": "green", "value": None}]
    if panel.bad_above is not None:
        steps.append({"color": "red", "value": panel.bad_above})
    return steps


def _at_right(query: Query) -> Json:
    return {
        "matcher": {"id": "byName", "options": query.legend},
        "properties": [
            {"id": "custom.axisPlacement", "value": "right"},
            {"id": "custom.lineInterpolation", "value": "stepAfter"},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "unit", "value": "short"},
        ],
    }


_STAT_OPTIONS: Json = {
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    "colorMode": "value",
    "graphMode": "none",
    "textMode": "auto",
    "justifyMode": "auto",
    "orientation": "auto",
}
_TIMESERIES_OPTIONS: Json = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _datasource() -> Json:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
    }


def _variable(variable: Variable) -> Json:
    query = f"label_values({variable.query}, {variable.name})"
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "sort": 1,
        "multi": False,
        "includeAll": False,
        "hide": 0,
    }
