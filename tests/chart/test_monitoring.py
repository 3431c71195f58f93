"""Dashboards and alerts: their queries parse and name existing metrics, and the chart ships them unchanged."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from charts.dashboards.__main__ import main as write_dashboards
from isthmus.aggregator.telemetry.metrics import AggregatorMetrics
from isthmus.aggregator.telemetry.secure_metrics import SecureMetrics
from isthmus_bridge.metrics import Metrics as BridgeMetrics
from isthmus_operator.metrics import REGISTRY, JobsCollector

from .conftest import MONITORING, WITH_MONITORING, Manifest

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "charts" / "isthmus" / "files" / "dashboards"
ALERTS = ROOT / "charts" / "isthmus" / "files" / "alerts" / "isthmus.yaml"
ALERT_TESTS = Path(__file__).parent / "alerts_test.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks"
# Replacements for Grafana's variables; any value suffices to check the syntax.
VARIABLES = {"$__rate_interval": "5m", "$namespace": "team", "$job": "digits", "$site": "lumi"}
ON = {"monitoring": {"enabled": True, "bridges": {"targets": ["login1.example:9090"]}}}


@pytest.fixture(scope="session")
def promtool(require: Callable[[bool, str], None]) -> Callable[..., str]:
    """Return a function that runs promtool and fails with its output."""
    program = shutil.which("promtool")
    require(program is not None, "promtool is missing: install Debian's package prometheus")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def dashboards() -> dict[str, Manifest]:
    return {path.name: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def rules() -> list[Manifest]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the place of each query, and the query."""
    for dashboard in dashboards().values():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{dashboard['title']}: {panel['title']} {target['refId']}", target["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


def series(families: Iterable[Metric]) -> set[str]:
    """Return the names under which Prometheus stores the metrics of a service."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {family.name + ending for family in families for ending in endings[family.type]}


def live() -> set[str]:
    jobs = JobsCollector(lambda: [], lambda: {}, lambda: {})
    aggregator = AggregatorMetrics("n", "j")
    SecureMetrics(aggregator)
    registries: list[CollectorRegistry] = [aggregator.registry, REGISTRY, BridgeMetrics().registry]
    return series(jobs.collect()).union(*(series(registry.collect()) for registry in registries))


def test_the_dashboards_are_the_generated_ones(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in DASHBOARDS.iterdir()
    }, "run `make generate`"


def test_every_metric_in_a_query_is_exported_by_a_service() -> None:
    known = live()
    for where, expression in expressions():
        named = set(re.findall(r"\bisthmus_\w+", expression))
        assert named, where
        assert named <= known, f"{where} names {named - known}"


def test_every_variable_asks_for_a_metric_that_exists_with_that_label() -> None:
    known = live()
    for dashboard in dashboards().values():
        for variable in dashboard["templating"]["list"][1:]:
            assert set(re.findall(r"\bisthmus_\w+", variable["definition"])) <= known
            assert variable["definition"].endswith(f", {variable['name']})")


def test_every_query_parses(promtool: Callable[..., str], tmp_path: Path) -> None:
    recorded = []
    for number, (_, expression) in enumerate(expressions()):
        filled = re.sub(r"\$\w+", lambda variable: VARIABLES[variable[0]], expression)
        recorded.append({"record": f"query:{number}", "expr": filled})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in promtool("check", "rules", file)


def test_dashboards_can_be_installed_anywhere_beside_others() -> None:
    found = dashboards()
    assert {board["uid"] for board in found.values()} == {"isthmus-fleet", "isthmus-job", "isthmus-site"}
    for board in found.values():
        assert board["schemaVersion"] >= 39
        first = board["templating"]["list"][0]
        assert (first["type"], first["query"], first["name"]) == ("datasource", "prometheus", "datasource")
        declared = {variable["name"] for variable in board["templating"]["list"]}
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            assert panel["title"] and panel["description"]
            for part in (panel, *panel["targets"]):
                assert part["datasource"]["uid"] == "${datasource}"
            for target in panel["targets"]:
                # Names of namespaces, jobs and sites come from variables only.
                for value in re.findall(r'\b(?:namespace|job|site|pool)=~?"(.*?)"', target["expr"]):
                    assert value.startswith("$") and value[1:] in declared
        taken = [(x, y) for panel in board["panels"] for x, y in _cells(panel["gridPos"])]
        assert len(taken) == len(set(taken)), "panels overlap"


def _cells(grid: dict[str, int]) -> Iterator[tuple[int, int]]:
    assert grid["x"] + grid["w"] <= 24
    return ((grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"]))


def test_the_alerts_pass_their_unit_tests(promtool: Callable[..., str]) -> None:
    promtool("check", "rules", ALERTS)
    assert "SUCCESS" in promtool("test", "rules", ALERT_TESTS)


def test_every_alert_is_tested_in_both_directions_and_has_a_page() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    cases = [case for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(names)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} >= set(names) - {"IsthmusSlurmDown"}
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {*names}
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        page = (RUNBOOKS / f"{rule['alert']}.md").read_text()
        assert page.startswith(f"# {rule['alert']}: ")
        assert all(f"**{part}**" in page for part in ("What it means.", "What it costs.", "Fix."))


def test_the_schema_knows_the_alerts_that_can_be_disabled() -> None:
    schema = json.loads((ROOT / "charts" / "isthmus" / "values.schema.json").read_text())
    known = schema["properties"]["monitoring"]["properties"]["prometheusRule"]["properties"]["disabled"]["items"][
        "enum"
    ]
    assert known == [rule["alert"] for rule in rules()]


def test_the_chart_ships_the_dashboards_as_they_are(helm: Any) -> None:
    values = {"monitoring": {"enabled": True, "dashboards": {"annotations": {"grafana_folder": "Isthmus"}}}}
    shipped: Manifest = {}
    for document in helm.template(values):
        if document["kind"] == "ConfigMap":
            assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
            assert document["metadata"]["annotations"] == {"grafana_folder": "Isthmus"}
            shipped |= {name: json.loads(text) for name, text in document["data"].items()}
    assert shipped == dashboards()


def test_monitors_need_the_value_and_the_api(helm: Any) -> None:
    kinds = set(MONITORING)
    assert not kinds & {document["kind"] for document in helm.template(ON)}
    assert not kinds & {document["kind"] for document in helm.template({}, *WITH_MONITORING)}
    assert kinds <= {document["kind"] for document in helm.template(ON, *WITH_MONITORING)}
    each = ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
    off = {"monitoring": {"enabled": True, **{name: {"enabled": False} for name in each}}}
    no_webhook: Manifest = {"webhook": {"enabled": False}}  # its certificates are new each time
    assert helm.template({**off, **no_webhook}, *WITH_MONITORING) == helm.template(no_webhook)


def test_monitors_find_what_they_are_for(helm: Any) -> None:
    documents = helm.template(ON, *WITH_MONITORING)
    by_kind = {document["kind"]: document for document in documents}
    (service,) = [d for d in documents if d["kind"] == "Service" and d["metadata"]["name"].endswith("-metrics")]
    monitor = by_kind["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert by_kind["PodMonitor"]["spec"]["namespaceSelector"] == {"any": True}
    assert by_kind["ScrapeConfig"]["spec"]["staticConfigs"] == [{"targets": ["login1.example:9090"]}]
    # In Isthmus' metrics, the label `job` names the FederatedJob.
    assert all(endpoint["honorLabels"] for endpoint in monitor["endpoints"])
    assert all(endpoint["honorLabels"] for endpoint in by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"])
    scoped = helm.template({**ON, "scope": {"type": "Namespaces", "namespaces": ["a", "b"]}}, *WITH_MONITORING)
    (pods,) = [document for document in scoped if document["kind"] == "PodMonitor"]
    assert pods["spec"]["namespaceSelector"] == {"matchNames": ["a", "b"]}


def test_the_rule_holds_the_alerts_that_are_wanted(helm: Any, promtool: Callable[..., str], tmp_path: Path) -> None:
    options = {
        "disabled": ["IsthmusRoundStuck"],
        "runbookUrl": "https://docs.example/runbooks/",
        "alertLabels": {"team": "hpc"},
    }
    documents = helm.template({"monitoring": {"enabled": True, "prometheusRule": options}}, *WITH_MONITORING)
    (rule,) = [document for document in documents if document["kind"] == "PrometheusRule"]
    file = tmp_path / "rule.yaml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    promtool("check", "rules", file)
    shipped = [alert for group in rule["spec"]["groups"] for alert in group["rules"]]
    for alert in shipped:
        name = alert["alert"]
        assert alert["annotations"].pop("runbook_url") == f"https://docs.example/runbooks/{name}/"
        assert alert["labels"].pop("team") == "hpc"
    assert shipped == [alert for alert in rules() if alert["alert"] != "IsthmusRoundStuck"]
