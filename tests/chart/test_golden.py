"""What the chart renders, kept as files, so that a change of a template shows what it changes.

``ISTHMUS_UPDATE_GOLDEN=1 python -m pytest tests/chart/test_golden.py`` writes them anew; look at the difference.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import MATRIX, WITH_MONITORING, Manifest

GOLDEN = Path(__file__).parent / "golden"


def essence(document: Manifest) -> Manifest:
    """Without what other tests compare with its source: the bodies of CRDs, dashboards and alerts; and certificates."""
    if document["kind"] == "CustomResourceDefinition":
        return {**document, "spec": "…"}
    if document["kind"] == "PrometheusRule":
        return {**document, "spec": [rule["alert"] for group in document["spec"]["groups"] for rule in group["rules"]]}
    if document["kind"].endswith("WebhookConfiguration"):
        return {**document, "webhooks": [without_bundle(webhook) for webhook in document["webhooks"]]}
    if document["kind"] in ("ConfigMap", "Secret"):
        return {**document, "data": dict.fromkeys(document["data"], "…")}
    return document


def without_bundle(webhook: Manifest) -> Manifest:
    """A webhook whose authority's certificate is new each time."""
    return {**webhook, "clientConfig": {**webhook["clientConfig"], "caBundle": "…"}}


def order(document: Manifest) -> tuple[str, str, str]:
    """Helm 3 and 4 sort differently."""
    metadata = document["metadata"]
    return document["kind"], metadata.get("namespace", ""), metadata["name"]


@pytest.mark.parametrize("case", MATRIX)
def test_the_chart_renders_as_before(helm: Any, case: str) -> None:
    documents = sorted(map(essence, helm.template(MATRIX[case], *WITH_MONITORING)), key=order)
    text = yaml.safe_dump_all(documents, allow_unicode=True, width=120)
    file = GOLDEN / f"{case}.yaml"
    if os.environ.get("ISTHMUS_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs: see this module's docstring"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(MATRIX)
