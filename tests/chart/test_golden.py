"""Golden files of the rendered chart.

Update them with ``ISTHMUS_UPDATE_GOLDEN=1 python -m pytest tests/chart/test_golden.py``, and review the difference.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import MATRIX, WITH_MONITORING, Manifest

GOLDEN = Path(__file__).parent / "golden"


def essence(document: Manifest) -> Manifest:
    """Replace certificates, and the bodies of CRDs, dashboards and alerts, which other tests check."""
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
    """Replace the CA certificate of a webhook, which is new each time."""
    return {**webhook, "clientConfig": {**webhook["clientConfig"], "caBundle": "…"}}


def order(document: Manifest) -> tuple[str, str, str]:
    """Return a sort key, because Helm 3 and 4 order objects differently."""
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
