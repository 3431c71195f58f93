"""Common parts of the operator's benchmarks: the lab's API server, the operator's process, start times of pods."""

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
    """kubectl failed."""


def kubectl(*arguments: str, stdin: Any = None) -> str:
    """Run kubectl and return its output. Raises :class:`KubectlError`."""
    text = None if stdin is None else json.dumps(stdin)
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def until(
    what: str, check: Callable[[], object], seconds: float, every: float = 0.5, show: Callable[[], object] = lambda: ""
) -> float:
    """Wait for a condition and return the seconds it took. On a timeout, also print the result of ``show``."""
    started = time.monotonic()
    while not check():
        if time.monotonic() - started > seconds:
            raise SystemExit(f"not within {seconds:.0f} s: {what} {show()}")
        time.sleep(every)
    return time.monotonic() - started


@contextmanager
def process(argv: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the end of the block."""
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
    """Plain requests to the API server: kubectl would use more of the machine than the measured process."""

    def __init__(self, connections_kept: int = 12) -> None:
        configuration = client.Configuration()
        load: Any = config
        load.load_kube_config(client_configuration=configuration)
        self._host = configuration.host.rstrip("/")
        self._pool = connections(configuration, connections_kept)

    def read(self, path: str) -> Any:
        """Return an object, a list, or the text if it is not JSON. Retries if the API server is too busy."""
        retries = urllib3.Retry(6, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
        answer = self._pool.request("GET", self._host + path, timeout=60, retries=retries)
        if answer.status >= 400:
            raise SystemExit(f"GET {path}: {answer.status} {answer.data[:300]!r}")
        return json.loads(answer.data) if answer.data[:1] == b"{" else answer.data.decode()

    def write(self, method: str, path: str, body: Any, content_type: str = "application/json") -> None:
        """Create, patch or delete an object."""
        headers = {"Content-Type": content_type}
        answer = self._pool.request(
            method, self._host + path, body=json.dumps(body), headers=headers, timeout=60, retries=False
        )
        if answer.status >= 400 and not (answer.status == 404 and method == "DELETE"):
            raise SystemExit(f"{method} {path}: {answer.status} {answer.data[:300]!r}")

    def patch(self, path: str, body: Any) -> None:
        """Send a JSON merge patch."""
        self.write("PATCH", path, body, "application/merge-patch+json")

    def lines(self, path: str) -> urllib3.BaseHTTPResponse:
        """Yield the lines of a streamed response, such as a watch."""
        return self._pool.request("GET", self._host + path, preload_content=False, timeout=urllib3.Timeout(30, 900))

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        """Return a FederatedJob."""
        return dict(self.read(f"{_JOBS.format(namespace)}/{name}"))

    def jobs(self, namespace: str) -> list[dict[str, Any]]:
        """Return all FederatedJobs."""
        return list(self.read(_JOBS.format(namespace))["items"])

    def counted(self, resources: tuple[str, ...]) -> float:
        """Return the writes of these resources and their status that the API server has counted, by any client.

        Bindings and the status of pods, which only Kubernetes writes, are left out."""
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
    """Watch that records when each pod was created, scheduled and running (by the clock of this process)."""

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
        """Stop the watch."""
        self._ended = True
        if self._answer is not None:
            self._answer.close()

    def _watch(self, version: str) -> None:
        while not self._ended:
            self._answer = self._api.lines(f"{self._path}&watch=1&resourceVersion={version}")
            # Closing the response from another thread ends the reading, with or without an error.
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
        """Wait for running pods; return the seconds from ``started`` until all were created, scheduled and running."""
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
    """The operator's process: its resources and its requests to the API server."""

    def __init__(self, child: "subprocess.Popen[bytes]", log: Path) -> None:
        self._child = child
        self._log = log
        self._proc = Path(f"/proc/{child.pid}")

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Return the resident memory; ``VmHWM`` gives its peak."""
        found = re.search(rf"^{field}:\s+(\d+) kB", (self._proc / "status").read_text(), re.MULTILINE)
        assert found is not None
        return round(int(found[1]) * 1024 / 1e6, 1)

    def threads(self) -> int:
        """Return the number of threads."""
        return len(list((self._proc / "task").iterdir()))

    def files(self) -> int:
        """Return the number of open files and sockets."""
        return len(list((self._proc / "fd").iterdir()))

    def cpu(self) -> float:
        """Return the processor time since its start, in seconds."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def metrics(self) -> str:
        """Return the text of its metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{_METRICS}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def value(self, name: str, text: str | None = None) -> float:
        """Return the sum of the series of a metric."""
        found = re.findall(rf"^{name}(?:\{{.*?\}})? (\S+)", text or self.metrics(), re.MULTILINE)
        return sum(map(float, found))

    def requests(self) -> dict[str, float]:
        """Return the number of requests to the API server by method, without the watches of kopf."""
        counts: dict[str, float] = {}
        for method, value in re.findall(
            r'isthmus_operator_api_requests_total\{.*?method="(\w+)"\} (\S+)', self.metrics()
        ):
            counts[method] = counts.get(method, 0) + float(value)
        return counts

    def ready(self) -> bool:
        """Return the result of the readiness probe. Exits if the operator has ended."""
        if self._child.poll() is not None:
            raise SystemExit(f"the operator ended: {self._log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_HEALTH}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def at_rest(self, seconds: float) -> dict[str, float]:
        """Measure for some seconds: processor time in percent of a core, requests to the API server per second."""
        cpu, before, since = self.cpu(), sum(self.requests().values()), time.monotonic()
        time.sleep(seconds)
        used, passed = self.cpu() - cpu, time.monotonic() - since
        return {
            "steady_cpu_percent": round(100 * used / passed, 2),
            "steady_requests_per_s": round((sum(self.requests().values()) - before) / passed, 2),
        }


@contextmanager
def operator(namespace: str, directory: Path, *options: str) -> Iterator[Operator]:
    """Start the operator for one namespace and yield it when it is ready."""
    argv = [sys.executable, "-m", "isthmus_operator", "-n", namespace, "--cluster", "bench",
            "--metrics", f"127.0.0.1:{_METRICS}", "--health", f"127.0.0.1:{_HEALTH}", *options]  # fmt: skip
    log = directory / "operator.log"
    with process(argv, log) as child:
        running = Operator(child, log)
        until("the operator is ready", running.ready, 120, 0.1)
        yield running


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """Create the custom resources and a namespace; delete the namespace with its contents at the end."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/federatedjobs.isthmus.dev")
    # Remains of a killed run.
    kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=600s")
    kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        release(name)
        kubectl("delete", "namespace", name, "--timeout=600s")


def release(name: str) -> None:
    """Remove finalizers, so that jobs can be deleted without an operator."""
    api = Api()
    for job in api.jobs(name):
        if job["metadata"].get("finalizers"):
            path = f"{_JOBS.format(name)}/{job['metadata']['name']}"
            api.patch(path, {"metadata": {"finalizers": None}})


def manifest(
    name: str, namespace: str, clients: int, template: Any, aggregator: Any = None, **spec: Any
) -> dict[str, Any]:
    """Return a FederatedJob with one pool. ``template`` is for all its pods, or all but the aggregator's."""
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
