"""Upgrades with an earlier chart's values (``helm upgrade --reuse-values``), which lack the new keys."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import CHART, MATRIX, NAMESPACE, ROOT, WITH_MONITORING, Helm, Manifest
from .test_golden import essence, order

DEFAULTS: Manifest = yaml.safe_load((CHART / "values.yaml").read_text())
# A user may remove these on purpose, so the chart must not restore them.
NULLABLE = ("podSecurityContext", "securityContext", "resources")
KEPT = {key: DEFAULTS[key] for key in NULLABLE}
# If a default is empty, a template sees no difference when its key is missing.
FILLED = [key for key, default in DEFAULTS.items() if default and isinstance(default, dict) and key not in NULLABLE]


def merged(defaults: Manifest, values: Manifest) -> Manifest:
    result = copy.deepcopy(defaults)
    for key, value in values.items():
        inner = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inner else value
    return result


def reused(helm: Helm, chart: Path, values: Manifest) -> list[Manifest]:
    """Render an upgrade that uses only these values, without the chart's defaults.

    ``--reuse-values`` replaces the chart's own values with those of an earlier release.
    """
    shutil.copytree(CHART, chart)
    (chart / "values.yaml").write_text(json.dumps(values))
    result = helm.run("template", "isthmus", str(chart), "--namespace", NAMESPACE, *WITH_MONITORING)
    assert result.returncode == 0, result.stderr
    return essential([document for document in yaml.load_all(result.stdout, Loader=yaml.CSafeLoader) if document])


def essential(documents: list[Manifest]) -> list[Manifest]:
    return [essence(document) for document in sorted(documents, key=order)]


def test_the_chart_carries_a_copy_of_its_defaults() -> None:
    assert (CHART / "files" / "values.yaml").read_bytes() == (CHART / "values.yaml").read_bytes(), "run `make generate`"


@pytest.mark.parametrize("case", MATRIX)
def test_values_that_were_not_set_may_be_missing(helm: Helm, tmp_path: Path, case: str) -> None:
    wanted = essential(helm.template(MATRIX[case], *WITH_MONITORING))
    assert reused(helm, tmp_path / "isthmus", {**KEPT, **MATRIX[case]}) == wanted


@pytest.mark.parametrize("key", FILLED)
def test_each_key_may_be_missing(helm: Helm, tmp_path: Path, key: str) -> None:
    # Enable everything, or most templates would not read the key.
    values = merged(DEFAULTS, {k: v for k, v in MATRIX["everything"].items() if k != key})
    wanted = essential(helm.template(values, *WITH_MONITORING))
    assert reused(helm, tmp_path / "isthmus", {k: v for k, v in values.items() if k != key}) == wanted


def earlier_values() -> list[Manifest]:
    """Return the values of this chart's earlier versions from git's history, the newest first."""
    file = str(CHART.relative_to(ROOT) / "values.yaml")
    git = ["git", "-C", str(ROOT)]
    said = subprocess.run([*git, "log", "--format=%H", "--", file], capture_output=True, text=True, check=False)
    shown = [
        subprocess.run([*git, "show", f"{commit}:{file}"], capture_output=True, text=True, check=False).stdout
        for commit in said.stdout.split()[:30]
    ]
    return [yaml.safe_load(text) for text in dict.fromkeys(shown) if text][:12]


def test_an_upgrade_takes_the_values_of_every_earlier_chart(
    helm: Helm, tmp_path: Path, require: Callable[[bool, str], None]
) -> None:
    require(shutil.which("git") is not None, "install Debian's package git")
    require((ROOT / ".git").exists(), "check the project out with git, whose history holds the earlier charts")
    for number, values in enumerate(earlier_values()):
        on = merged(values, {"monitoring": {"enabled": True}, "gateway": {"enabled": True, "hosts": ["g.example"]}})
        # --reuse-values adds no defaults; --reset-then-reuse-values and --values add the new ones.
        assert reused(helm, tmp_path / f"chart-{number}", on)
        assert helm.template(on, *WITH_MONITORING)


def test_values_that_a_user_removed_stay_removed(helm: Helm) -> None:
    removed: dict[str, Any] = {
        "podSecurityContext": {"fsGroup": None, "runAsUser": None},
        "securityContext": None,
        "resources": {"limits": None},
        "monitoring": {"enabled": True, "dashboards": {"labels": {"grafana_dashboard": None}}},
    }
    documents = helm.template(removed, *WITH_MONITORING)
    (pod,) = [item["spec"]["template"]["spec"] for item in documents if item["kind"] == "Deployment"]
    assert pod["securityContext"].keys() == {"runAsNonRoot", "runAsGroup", "seccompProfile"}
    (container,) = pod["containers"]
    assert "securityContext" not in container
    assert container["resources"] == {"requests": {"cpu": "100m", "memory": "128Mi"}}
    dashboards = [item for item in documents if "-dashboard-" in item["metadata"]["name"]]
    assert dashboards
    assert not [item for item in dashboards if "grafana_dashboard" in item["metadata"]["labels"]]


def test_as_part_of_another_chart(helm: Helm, tmp_path: Path) -> None:
    """Helm passes the parent's condition (``isthmus.enabled``) and ``global`` to a subchart with its values."""
    parent = tmp_path / "parent"
    shutil.copytree(CHART, parent / "charts" / "isthmus")
    dependency = {"name": "isthmus", "version": "*", "condition": "isthmus.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    for enabled, kinds in ((True, {"Deployment"}), (False, set())):
        values = {"global": {"imageRegistry": "r.example"}, "isthmus": {"enabled": enabled}}
        result = helm.run("template", "p", str(parent), "--namespace", NAMESPACE, values=values)
        assert result.returncode == 0, result.stderr
        documents = [item for item in yaml.load_all(result.stdout, Loader=yaml.CSafeLoader) if item]
        assert {item["kind"] for item in documents} & {"Deployment"} == kinds
