"""The notes that Helm prints after an installation."""

import shutil
from pathlib import Path

import pytest
import yaml

from .conftest import CHART, NAMESPACE, Helm, Manifest


def notes(helm: Helm, folder: Path, values: Manifest) -> str:
    """Return the notes. Helm 3 shows them only if it reaches a cluster, so they are rendered as an object."""
    chart = folder / "isthmus"
    shutil.copytree(CHART, chart)
    (chart / "templates" / "NOTES.txt").rename(chart / "notes.txt")
    wrapped = 'notes: |\n  {{- tpl (.Files.Get "notes.txt") . | nindent 2 }}\n'
    (chart / "templates" / "notes.yaml").write_text(wrapped)
    options = ("--namespace", NAMESPACE, "--show-only", "templates/notes.yaml")
    result = helm.run("template", "isthmus", str(chart), *options, values=values)
    assert result.returncode == 0, result.stderr
    return str(yaml.safe_load(result.stdout)["notes"])


@pytest.mark.parametrize("keep", [True, False])
def test_they_say_how_to_uninstall(helm: Helm, tmp_path: Path, keep: bool) -> None:
    text = notes(helm, tmp_path, {"crds": {"keep": keep}})
    assert "kubectl delete federatedjobs --all --all-namespaces" in text
    assert ("Uninstalling leaves the custom resource definitions" in text) == keep
    assert ("Uninstalling deletes the custom resource definitions" in text) == (not keep)


def test_they_name_the_namespaces_that_are_served(helm: Helm, tmp_path: Path) -> None:
    text = notes(helm, tmp_path, {"scope": {"type": "Namespaces", "namespaces": ["team-a", "team-b"]}})
    for namespace in ("team-a", "team-b"):
        assert f"kubectl -n {namespace} get federatedjobs --watch" in text
        assert f"kubectl -n {namespace} delete federatedjobs --all" in text
