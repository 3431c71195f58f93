"""Monitoring enabled: a run with pods and Slurm, a real Prometheus, and data in every panel of every dashboard."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.dashboards.data import Window, evaluate

from .conftest import SITE, SYSTEM, Platform, eventually, get, run, say
from .monitoring import ADDRESS, EVERY, Prometheus, now

BRIDGE = "127.0.0.1:9464"
GROUP = "monitoring.coreos.com"
pytestmark = pytest.mark.timeout(1800)


def test_the_chart_creates_monitors_alerts_and_dashboards(cluster: Platform) -> None:
    say(run("helm", "test", "isthmus", "--namespace", SYSTEM, "--timeout", "600s"))
    boards = [json.loads(text) for item in get("configmaps", SYSTEM, "-l", "grafana_dashboard=1")
              for text in item["data"].values()]  # fmt: skip
    assert {board["uid"] for board in boards} == {"isthmus-fleet", "isthmus-job", "isthmus-site"}
    if cluster.site is None:
        return  # without the lab, the cluster may lack the Prometheus Operator
    # The API knows all fields that the chart sets; it would have dropped unknown ones.
    for kind, plain in (("servicemonitors", "endpoints"), ("podmonitors", "podMetricsEndpoints")):
        (monitor,) = get(f"{kind}.{GROUP}", SYSTEM)
        assert monitor["spec"][plain][0] == {
            "port": "metrics",
            "path": "/metrics",
            "interval": "15s",
            "honorLabels": True,
        }
    (rule,) = get(f"prometheusrules.{GROUP}", SYSTEM)
    (group,) = rule["spec"]["groups"]
    assert {alert["alert"] for alert in group["rules"]} >= {"IsthmusOperatorStalled", "IsthmusCertificateExpiry"}


# Its series have the reasons for which clients were dropped; a healthy job has none.
AFTER_FAULTS = "isthmus_secure_faults_total"


def test_every_panel_of_every_dashboard_has_data(
    platform: Platform, job: str, tmp_path: Path, require: Callable[[bool, str], None]
) -> None:
    require(shutil.which("prometheus") is not None, "Prometheus is missing: install Debian's package prometheus")
    with Prometheus(tmp_path, BRIDGE) as prometheus:
        eventually("the bridge is scraped", lambda: ("isthmus-bridges", "") in prometheus.up())
        began = now()
        platform.apply(platform.manifest(f"{job}-denied", pools__1__hpc__partition="forbidden"))
        eventually("the site has denied it", lambda: _denied(platform, f"{job}-denied"))
        # Two clients are selected and a round ends with the faster one, so one update is always late.
        late = {"policy": "Random", "fraction": "0.5", "overSelect": "1", "minClients": 1}
        platform.apply(platform.manifest(f"{job}-late", pools=_in_the_cloud(platform), selection=late,
                                         rounds=200, stragglers={"minUpdates": 1}))  # fmt: skip
        # Secure aggregation takes no codec, so another job shows its panels.
        secure, four = f"{job}-secure", [{**_in_the_cloud(platform)[0], "replicas": 4}]
        platform.apply(platform.manifest(secure, pools=four, rounds=60,
                                         privacy={"secureAggregation": {"maxExamples": 2000}}))  # fmt: skip
        changes = {
            "rounds": 100,
            "compression": {"upload": "Int8"},
            "privacy": {"differentialPrivacy": {"clipNorm": "4", "noiseMultiplier": "0.02", "maxEpsilon": "1e6"}},
        }
        platform.apply(platform.manifest(job, task__config__localEpochs="8", **changes))
        aggregator = ("isthmus", f"{job}-aggregator")
        eventually("all three services are scraped", lambda: _all_three(prometheus.up(), aggregator))
        say(f"scraped: {sorted(prometheus.up())}")
        platform.wait_for_completion(job)
        platform.wait_for_completion(secure)
        ends = {name: prometheus.last(f'isthmus_rounds_completed{{job="{name}"}}') for name in (job, secure)}
        for other in (f"{job}-denied", f"{job}-late", secure):
            run("kubectl", "-n", platform.namespace, "delete", "fj", other, "--timeout=300s")

        empty = []
        for board in _shipped():
            variables = {"__rate_interval": "30s", "namespace": platform.namespace, "site": SITE}
            shown, other = (
                evaluate(board, ADDRESS, variables | {"job": name}, Window(began, ends[name], EVERY))
                for name in (job, secure)
            )
            series = sum(len(found) for item in shown for found in item.results)
            say(f"{board['title']}: {len(shown)} panels, {series} series in {ends[job] - began:.0f} s")
            pairs = [(item, query) for item, also in zip(shown, other, strict=True)
                     for query in item.empty if query in also.empty and AFTER_FAULTS not in query]  # fmt: skip
            empty += [f"{board['title']}: {item.panel['title']}: {query}" for item, query in pairs]
            if directory := os.environ.get("ISTHMUS_PICTURES"):
                from charts.dashboards.picture import draw

                draw(board["title"], shown, Path(directory) / f"{board['uid']}.png")
        assert not empty, "\n".join(["no data for:", *empty])

        # The rules are evaluated without errors, and a healthy platform raises no alert.
        def evaluated() -> list[str]:
            """Return the rules' health, or nothing while one is "unknown", which it is before its first evaluation."""
            (rules,) = prometheus.get("rules")["groups"]
            health = [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for rule in rules["rules"]]
            return [] if any(": unknown" in line for line in health) else health

        health = eventually("every rule was evaluated", evaluated)
        assert all(line.endswith(": ok ") for line in health), health
        assert not [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]


def _in_the_cloud(platform: Platform) -> list[dict[str, Any]]:
    return [pool for pool in platform.manifest("any")["spec"]["pools"] if "cloud" in pool]


def _denied(platform: Platform, job: str) -> bool:
    return any("partition" in pool.get("reason", "") for pool in platform.status(job).get("pools", []))


def _all_three(up: set[tuple[str, str]], aggregator: tuple[str, str]) -> bool:
    operator = any(pool == "isthmus" and pod.startswith("isthmus-operator-") for pool, pod in up)
    return operator and aggregator in up and ("isthmus-bridges", "") in up


def _shipped() -> list[dict[str, Any]]:
    """Return the dashboards from the cluster."""
    maps = yaml.safe_load(run("kubectl", "-n", SYSTEM, "get", "configmaps", "-l", "grafana_dashboard=1", "-o", "yaml"))
    return [json.loads(text) for item in maps["items"] for text in item["data"].values()]
