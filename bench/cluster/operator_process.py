"""What the operator's benchmarks share: the lab's API server, the operator's process, pods as they come up."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config

from isthmus_operator.effects.kube import connections

ROOT = Path(__file__).parents[2]
WRITES = ("POST", "PATCH", "PUT", "DELETE")
_METRICS, _HEALTH = 18080, 18081
_TICKS = os.sysconf("SC_CLK_TCK")
_JOBS = "/apis/isthmus.dev/v1alpha1/namespaces/{}/federatedjobs"


class KubectlError(Exception):
    """kubectl did not do as it was asked."""


def kubectl(*arguments: str, stdin: Any = None) -> str:
    """Runs kubectl; its output. Raises :class:`KubectlError`."""
    text = None if stdin is None else json.dumps(stdin)
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def until(
    what: str, check: Callable[[], object], seconds: float, every: float = 0.5, show: Callable[[], object] = lambda: ""
) -> float:
    """Waits; tells how many seconds that took. ``show``: what is told besides where it was in vain."""
    started = time.monotonic()
    while not check():
        if time.monotonic() - started > seconds:
            raise SystemExit(f"not within {seconds:.0f} s: {what} {show()}")
        time.sleep(every)
    return time.monotonic() - started


@contextmanager
def process(argv: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    with log.open("ab") as output:
        child = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Api:
    """Plain requests to the API server: kubectl would take more of the machine than what is measured."""

    def __init__(self, connections_kept: int = 12) -> None:
        configuration = client.Configuration()
        load: Any = config
        load.load_kube_config(client_configuration=configuration)
        self._host = configuration.host.rstrip("/")
        self._pool = connections(configuration, connections_kept)

    def read(self, path: str) -> Any:
        """An object, a list, or the text of what is not JSON. Tried again where the API server is too busy."""
        retries = urllib3.Retry(6, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
        answer = self._pool.request("GET", self._host + path, timeout=60, retries=retries)
        if answer.status >= 400:
            raise SystemExit(f"GET {path}: {answer.status} {answer.data[:300]!r}")
        return json.loads(answer.data) if answer.data[:1] == b"{" else answer.data.decode()

    def write(self, method: str, path: str, body: Any, content_type: str = "application/json") -> None:
        """Creates, patches or deletes."""
        headers = {"Content-Type": content_type}
        answer = self._pool.request(
            method, self._host + path, body=json.dumps(body), headers=headers, timeout=60, retries=False
        )
        if answer.status >= 400 and not (answer.status == 404 and method == "DELETE"):
            raise SystemExit(f"{method} {path}: {answer.status} {answer.data[:300]!r}")

    def patch(self, path: str, body: Any) -> None:
        """JSON merge patch."""
        self.write("PATCH", path, body, "application/merge-patch+json")

    def lines(self, path: str) -> urllib3.BaseHTTPResponse:
        """An answer that goes on, such as a watch's."""
        return self._pool.request("GET", self._host + path, preload_content=False, timeout=urllib3.Timeout(30, 900))

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        """A FederatedJob."""
        return dict(self.read(f"{_JOBS.format(namespace)}/{name}"))

    def jobs(self, namespace: str) -> list[dict[str, Any]]:
        """Every FederatedJob."""
        return list(self.read(_JOBS.format(namespace))["items"])

    def counted(self, resources: tuple[str, ...]) -> float:
        """Writes of these resources, their status included, that the API server has counted, whoever made them;
        bindings and the status of pods, which only Kubernetes writes, are left out."""
        total = 0.0
        for labels, value in re.findall(
            r"^apiserver_request_total\{(.*?)\} (\S+)", self.read("/metrics"), re.MULTILINE
        ):
            found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            kubernetes_own = found["resource"] == "pods" and found["subresource"]
            if found["resource"] in resources and not kubernetes_own and found["verb"] in (*WRITES, "APPLY"):
                total += float(value)
        return total


class PodTimes:
    """Watches pods from its making on: when each was created, scheduled, and ran (by the clock of this process)."""

    def __init__(self, api: Api, namespace: str, selector: str) -> None:
        self.created: dict[str, float] = {}
        self.scheduled: dict[str, float] = {}
        self.running: dict[str, float] = {}
        self._path = f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}"
        self._api = api
        self._answer: urllib3.BaseHTTPResponse | None = None
        self._ended = False
        version = api.read(f"{self._path}&limit=1")["metadata"]["resourceVersion"]
        self._thread = threading.Thread(target=self._watch, args=(version,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch."""
        self._ended = True
        if self._answer is not None:
            self._answer.close()

    def _watch(self, version: str) -> None:
        while not self._ended:
            self._answer = self._api.lines(f"{self._path}&watch=1&resourceVersion={version}")
            # Closing it from outside ends the reading in one way or another.
            with contextlib.suppress(Exception):
                rest = b""
                for chunk in self._answer.stream(65536):
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        version = self._note(json.loads(line)) or version

    def _note(self, event: dict[str, Any]) -> str | None:
        now, pod = time.monotonic(), event["object"]
        if event["type"] in ("ERROR", "DELETED"):
            return None
        uid = pod["metadata"]["uid"]
        self.created.setdefault(uid, now)
        if pod["spec"].get("nodeName"):
            self.scheduled.setdefault(uid, now)
        if pod.get("status", {}).get("phase") == "Running":
            self.running.setdefault(uid, now)
        return str(pod["metadata"]["resourceVersion"])

    def until_running(self, number: int, started: float, seconds: float) -> dict[str, float]:
        """Waits until so many run. Seconds from ``started`` until all were created, scheduled, and ran."""
        until(
            f"{number} pods run",
            lambda: len(self.running) >= number,
            seconds,
            0.1,
            lambda: f"(created {len(self.created)}, scheduled {len(self.scheduled)}, running {len(self.running)})",
        )
        return {
            "created_s": round(max(self.created.values()) - started, 1),
            "scheduled_s": round(max(self.scheduled.values()) - started, 1),
            "running_s": round(max(self.running.values()) - started, 1),
        }


class Operator:
    """What the operator's process uses, and how often it asks the API server."""

    def __init__(self, child: "subprocess.Popen[bytes]", log: Path) -> None:
        self._child = child
        self._log = log
        self._proc = Path(f"/proc/{child.pid}")

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Resident memory; ``VmHWM``: its peak."""
        found = re.search(rf"^{field}:\s+(\d+) kB", (self._proc / "status").read_text(), re.MULTILINE)
        assert found is not None
        return round(int(found[1]) * 1024 / 1e6, 1)

    def threads(self) -> int:
        """Threads of the process."""
        return len(list((self._proc / "task").iterdir()))

    def files(self) -> int:
        """Open files and sockets."""
        return len(list((self._proc / "fd").iterdir()))

    def cpu(self) -> float:
        """Seconds of processor time since its start."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def metrics(self) -> str:
        """Its metrics' text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{_METRICS}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def value(self, name: str, text: str | None = None) -> float:
        """The sum of a metric's series."""
        found = re.findall(rf"^{name}(?:\{{.*?\}})? (\S+)", text or self.metrics(), re.MULTILINE)
        return sum(map(float, found))

    def requests(self) -> dict[str, float]:
        """Requests to the API server by method; watches, which kopf makes, are not among them."""
        counts: dict[str, float] = {}
        for method, value in re.findall(
            r'isthmus_operator_api_requests_total\{.*?method="(\w+)"\} (\S+)', self.metrics()
        ):
            counts[method] = counts.get(method, 0) + float(value)
        return counts

    def ready(self) -> bool:
        """What its readiness probe says. Ends the benchmark where the operator has ended."""
        if self._child.poll() is not None:
            raise SystemExit(f"the operator ended: {self._log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_HEALTH}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def at_rest(self, seconds: float) -> dict[str, float]:
        """Measures for so long: processor time in percent of a core, requests to the API server a second."""
        cpu, before, since = self.cpu(), sum(self.requests().values()), time.monotonic()
        time.sleep(seconds)
        used, passed = self.cpu() - cpu, time.monotonic() - since
        return {
            "steady_cpu_percent": round(100 * used / passed, 2),
            "steady_requests_per_s": round((sum(self.requests().values()) - before) / passed, 2),
        }


@contextmanager
def operator(namespace: str, directory: Path, *options: str) -> Iterator[Operator]:
    """The operator, serving one namespace, once it is ready."""
    argv = [sys.executable, "-m", "isthmus_operator", "-n", namespace, "--cluster", "bench",
            "--metrics", f"127.0.0.1:{_METRICS}", "--health", f"127.0.0.1:{_HEALTH}", *options]  # fmt: skip
    log = directory / "operator.log"
    with process(argv, log) as child:
        running = Operator(child, log)
        until("the operator is ready", running.ready, 120, 0.1)
        yield running


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """The resources and a namespace, which goes again with whatever is in it."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/federatedjobs.isthmus.dev")
    # Of a run that was killed.
    kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=600s")
    kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        release(name)
        kubectl("delete", "namespace", name, "--timeout=600s")


def release(name: str) -> None:
    """Has the jobs go without an operator."""
    api = Api()
    for job in api.jobs(name):
        if job["metadata"].get("finalizers"):
            path = f"{_JOBS.format(name)}/{job['metadata']['name']}"
            api.patch(path, {"metadata": {"finalizers": None}})


def manifest(
    name: str, namespace: str, clients: int, template: Any, aggregator: Any = None, **spec: Any
) -> dict[str, Any]:
    """A FederatedJob of one pool. ``template``: of all its pods, or but for the aggregator's."""
    return {
        "apiVersion": "isthmus.dev/v1alpha1",
        "kind": "FederatedJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "rounds": 3,
            "task": {"image": "isthmus.lab/busybox:1", "command": ["sleep", "3600"]},
            "aggregator": {"template": aggregator or template, "checkpoint": {"storage": "EmptyDir"}},
            "pools": [{"name": "cloud", "replicas": clients, "cloud": {"template": template}}],
            **spec,
        },
    }
