"""docs/operating/metrics.md lists exactly the existing metrics."""

import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from isthmus.aggregator.telemetry.metrics import AggregatorMetrics
from isthmus.aggregator.telemetry.secure_metrics import SecureMetrics
from isthmus.aggregator.telemetry.stage_times import CLIENT_STAGES, SERVER_STAGES
from isthmus.aggregator.updates.validation import Reason
from isthmus.client.session.stage_timer import REPORTED_STAGES
from isthmus_bridge.metrics import Metrics
from isthmus_operator.metrics import REGISTRY, JobsCollector

DOCS = (Path(__file__).parents[3] / "docs" / "operating" / "metrics.md").read_text()
Description = tuple[str, frozenset[str]]  # type, labels
OF_EVERY_JOB = {"namespace", "job"}
# The contract's labels, and a few with small closed sets of values. None of them distinguishes clients.
ALLOWED = {
    "namespace",
    "job",
    "pool",
    "site",
    "state",
    "stage",
    "result",
    "reason",
    "codec",
    "metric",
    "phase",
    "outcome",
}


def section(title: str) -> str:
    return re.split(r"^## ", DOCS.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def documented(title: str) -> dict[str, Description]:
    rows = re.findall(r"^\| `(isthmus_\w+)` \| (\w+) \|([^|]*)\|([^|]*)\|", section(title), flags=re.MULTILINE)
    for name, _, _, unit in rows:
        for ending in ("seconds", "bytes", "rounds"):
            if name.removesuffix("_total").endswith(f"_{ending}"):
                assert unit.strip() == ending, name
    return {name: (kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels, _ in rows}


def registered(registry: CollectorRegistry) -> dict[str, Description]:
    found = {}
    for collector in set(registry._names_to_collectors.values()):
        kind = collector._type  # type: ignore[attr-defined]
        name = collector._name + ("_total" if kind == "counter" else "")  # type: ignore[attr-defined]
        found[name] = (kind, frozenset(collector._labelnames))  # type: ignore[attr-defined]
    return found


def collected(families: Iterable[object]) -> dict[str, Description]:
    return {
        family.name: (family.type, frozenset(family.samples[0].labels))  # type: ignore[attr-defined]
        for family in families
    }


def test_the_aggregators() -> None:
    metrics = AggregatorMetrics("team", "job")
    SecureMetrics(metrics)
    found = registered(metrics.registry)
    assert {name: (kind, labels - OF_EVERY_JOB) for name, (kind, labels) in found.items()} == documented("Aggregator")
    assert all(labels >= OF_EVERY_JOB for _, labels in found.values())
    assert set().union(*(labels for _, labels in found.values())) <= ALLOWED


def test_the_operators() -> None:
    status = {"pools": [{"name": "cloud"}], "conditions": [{"type": "Accepted", "status": "True"}]}
    jobs = JobsCollector(lambda: [("team", "job", status)], lambda: {"lumi": True}, lambda: {"jobs": 1})
    found = registered(REGISTRY) | collected(jobs.collect())
    assert found == documented("Operator")


def test_the_bridges() -> None:
    assert registered(Metrics().registry) == documented("Bridge")


def test_a_bridge_names_its_site_in_every_sample() -> None:
    metrics = Metrics()
    metrics.denials.labels("partition").inc()
    server = metrics.serve("127.0.0.1:0", "lumi")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            samples = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    finally:
        server.shutdown()
        server.server_close()
    assert samples and all('site="lumi"' in sample for sample in samples)
    assert 'isthmus_bridge_denials_total{rule="partition",site="lumi"} 1.0' in samples


def test_no_other_metric_is_named_in_the_docs() -> None:
    known = {name for title in ("Aggregator", "Operator", "Bridge") for name in documented(title)}
    for path in (Path(__file__).parents[3] / "docs").rglob("*.md"):
        named = set(re.findall(r"`(isthmus_[a-z_]+)[`{]", path.read_text())) - {"isthmus_examples", "isthmus_contracts"}
        assert named <= known, f"{path.name}: {named - known}"


@pytest.mark.parametrize(("values", "title"), [(Reason, "refused"), ([*CLIENT_STAGES, *SERVER_STAGES], "Stages")])
def test_every_reason_and_stage_is_explained(values: Iterable[str], title: str) -> None:
    part = re.split(r"^### ", section("Aggregator"), flags=re.MULTILINE)
    table = next(text for text in part if title in text.splitlines()[0])
    first_cells = " ".join(re.findall(r"^\|([^|]*)\|", table, flags=re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) - {"stage", "reason"} == {str(value) for value in values}


def test_clients_report_the_metrics_that_the_aggregator_knows() -> None:
    assert set(REPORTED_STAGES.values()) == set(CLIENT_STAGES)
