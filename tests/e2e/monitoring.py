"""A real Prometheus that scrapes as examples/prometheus.yaml says.

Debian builds it without the discovery of Kubernetes. So the test lists the pods with kubectl and passes them on as
files, with the labels that the discovery would give. The example's own rules select and relabel them.
"""

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from .conftest import ROOT, eventually, run

ADDRESS = "http://127.0.0.1:9191"
EVERY = 2.0  # seconds between two scrapes


class Prometheus:
    """Prometheus that runs while the context lasts, and discovers pods as they come and go."""

    def __init__(self, directory: Path, bridge: str) -> None:
        self._directory = directory
        self._targets = directory / "pods.json"
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        config = yaml.safe_load((ROOT / "examples" / "prometheus.yaml").read_text())
        pods, bridges = config["scrape_configs"]
        assert pods.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        pods["file_sd_configs"] = [{"files": [str(self._targets)], "refresh_interval": "1s"}]
        bridges["static_configs"] = [{"targets": [bridge]}]
        for scraped in (pods, bridges):
            scraped |= {"scrape_interval": f"{EVERY:g}s", "scrape_timeout": f"{EVERY:g}s"}
        config["rule_files"] = [str(ROOT / "charts" / "isthmus" / "files" / "alerts" / "isthmus.yaml")]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> "Prometheus":
        self._write()
        with (self._directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={self._directory}/prometheus.yaml",
                 f"--storage.tsdb.path={self._directory}/data", f"--web.listen-address={ADDRESS.removeprefix('http://')}"],
                stdout=log, stderr=log,
            )  # fmt: skip
        self._watcher.start()
        eventually("Prometheus is ready", self._ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()
        self._process.terminate()
        self._process.wait()

    def get(self, path: str) -> Any:
        """Return the API's data under ``path``."""
        with urllib.request.urlopen(f"{ADDRESS}/api/v1/{path}", timeout=60) as answer:  # noqa: S310 - our own
            return json.load(answer)["data"]

    def up(self) -> set[tuple[str, str]]:
        """Return the scrape pool and the pod of every target whose last scrape succeeded."""
        targets = self.get("targets?state=active")["activeTargets"]
        return {(t["scrapePool"], t["labels"].get("pod", "")) for t in targets if t["health"] == "up"}

    def last(self, selector: str) -> float:
        """Return the time of the last scrape of a single series, in Unix seconds."""
        (series,) = self.get("query?" + urlencode({"query": f"{selector}[1h]"}))["result"]
        return float(series["values"][-1][0])

    def _ready(self) -> bool:
        assert self._process.poll() is None, (self._directory / "prometheus.log").read_text()
        try:
            with urllib.request.urlopen(f"{ADDRESS}/-/ready", timeout=60) as answer:  # noqa: S310 - our own
                return bool(answer.status == 200)
        except OSError:
            return False

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            self._write()

    def _write(self) -> None:
        try:
            pods = json.loads(run("kubectl", "get", "pods", "--all-namespaces", "-o", "json"))["items"]
        except AssertionError:
            return  # the next poll shows it
        partial = self._targets.with_suffix(".new")
        partial.write_text(json.dumps(list(_discovered(pods))))
        partial.rename(self._targets)


def _discovered(pods: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the targets of ``kubernetes_sd_configs: [{role: pod}]``: one for each port of each container."""
    for pod in pods:
        address = pod["status"].get("podIP")
        if not address:
            continue
        labels = {
            "__meta_kubernetes_namespace": pod["metadata"]["namespace"],
            "__meta_kubernetes_pod_name": pod["metadata"]["name"],
            "__meta_kubernetes_pod_phase": pod["status"]["phase"],
        }
        for name, value in pod["metadata"].get("labels", {}).items():
            labels["__meta_kubernetes_pod_label_" + "".join(c if c.isalnum() else "_" for c in name)] = value
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", [{}]):
                here = f"{address}:{port['containerPort']}" if port else address
                named = {"__meta_kubernetes_pod_container_port_name": port.get("name", "")} if port else {}
                yield {"targets": [here], "labels": labels | named}


def now() -> float:
    """Return the time in Unix seconds, as Prometheus counts."""
    return time.time()
