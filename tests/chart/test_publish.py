"""The chart in an OCI registry, and its annotations for Artifact Hub."""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus_contracts.manifests.crd import federated_job_crd, hpc_site_crd
from isthmus_contracts.manifests.manifest import parse_site_spec, parse_spec
from tools.release import dist, version

from .conftest import CHART, NAMESPACE, Helm


class Registry(BaseHTTPRequestHandler):
    """Registry with the part of the OCI distribution specification that Helm needs."""

    kept: dict[str, tuple[str, bytes]]

    def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        found = self.kept.get(self.path.rpartition("/")[2])
        if self.path == "/v2/":
            self._answer(200)
        elif found is None:
            self._answer(404)
        else:
            kind, content = found
            self._answer(200, content, Content_Type=kind, Docker_Content_Digest=_digest(content))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(202, Location=f"{self.path}upload")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path, _, query = self.path.partition("?")
        entry = (self.headers.get("Content-Type", ""), content)
        if query:
            self.kept[_digest(content)] = ("application/octet-stream", content)
        else:
            self.kept[path.rpartition("/")[2]] = self.kept[_digest(content)] = entry
        self._answer(201, Location=self.path, Docker_Content_Digest=_digest(content))

    def log_message(self, format: str, *args: object) -> None:
        pass


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def registry() -> Iterator[str]:
    handler = type("Handler", (Registry,), {"kept": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"oci://127.0.0.1:{server.server_port}/charts"
    server.shutdown()
    server.server_close()


def test_the_chart_is_pushed_and_installed_from_there(
    helm: Helm, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "_helm", lambda: helm.program)
    monkeypatch.setenv("HELM_REGISTRY_CONFIG", str(tmp_path / "registry.json"))
    (tmp_path / "charts").mkdir()
    dist.chart(tmp_path / "charts")
    assert dist.publish(tmp_path, registry, plain_http=True) == f"{registry}/isthmus:{version.current()}"
    options = ("--version", version.current(), "--namespace", NAMESPACE, "--plain-http")
    result = helm.run("template", "isthmus", f"{registry}/isthmus", *options)
    assert result.returncode == 0, result.stderr
    assert any(item and item["kind"] == "Deployment" for item in yaml.safe_load_all(result.stdout))


@pytest.mark.parametrize(
    ("registry_", "says"),
    [("https://registry.example", "is no OCI registry"), ("oci://registry.example/charts", "make dist DIST=chart")],
)
def test_refusals_to_publish(tmp_path: Path, registry_: str, says: str) -> None:
    with pytest.raises(version.ReleaseError, match=says):
        dist.publish(tmp_path, registry_)


def test_artifact_hub_lists_the_custom_resources() -> None:
    annotations: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]
    crds = yaml.safe_load(annotations["artifacthub.io/crds"])
    known = [federated_job_crd(), hpc_site_crd()]
    assert [(item["kind"], item["name"]) for item in crds] == [
        (crd["spec"]["names"]["kind"], crd["metadata"]["name"]) for crd in known
    ]
    assert [item["version"] for item in crds] == [crd["spec"]["versions"][0]["name"] for crd in known]
    # Its examples are valid manifests.
    parsers = {"FederatedJob": parse_spec, "HPCSite": parse_site_spec}
    examples = yaml.safe_load(annotations["artifacthub.io/crdsExamples"])
    assert [item["kind"] for item in examples] == list(parsers)
    for item in examples:
        parsers[item["kind"]](item["spec"])


def test_a_version_with_build_metadata_makes_valid_labels_and_tags(helm: Helm, tmp_path: Path) -> None:
    """Semantic versions may contain a ``+``, but labels and image tags must not."""
    shutil.copytree(CHART, tmp_path / "isthmus")
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())
    described |= {"version": "0.2.0+g1a2b3c4", "appVersion": "0.2.0+g1a2b3c4"}
    (tmp_path / "isthmus" / "Chart.yaml").write_text(yaml.safe_dump(described))
    result = helm.run("template", "isthmus", str(tmp_path / "isthmus"), "--namespace", NAMESPACE)
    assert result.returncode == 0, result.stderr
    for document in yaml.load_all(result.stdout, Loader=yaml.CSafeLoader):
        if document:
            assert "+" not in "".join(document["metadata"].get("labels", {}).values())
        if document and document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            assert container["image"].endswith(":0.2.0_g1a2b3c4")
