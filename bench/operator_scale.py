"""The operator at scale, on the lab's API server and hollow nodes (real kubelets over a runtime that runs nothing).

    python -m lab up --only kubernetes
    python -m lab exec -- python -m bench.operator_scale [--clients 1000] [--jobs 1000]

Prints a JSON line: seconds from apply until every client runs, requests to the API server per client, memory and CPU of
the operator then, and its memory with many idle jobs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lab import Lab, kubernetes_binaries

ROOT = Path(__file__).parents[1]
# A node takes 110; the hollow runtime is not made for haste (it dies of concurrent writes), so each gets fewer.
PODS_PER_NODE = 84
_SPARE = 2
NAMESPACE = "bench-operator"
_LABEL = "isthmus.dev/hollow"
_METRICS, _HEALTH = 18080, 18081
_TICKS = os.sysconf("SC_CLK_TCK")


class KubectlError(Exception):
    """kubectl did not do as it was asked."""


def kubectl(*arguments: str, stdin: Any = None) -> str:
    text = None if stdin is None else json.dumps(stdin)
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def until(what: str, check: Callable[[], bool], seconds: float, every: float = 0.5) -> float:
    """Waits; tells how many seconds that took."""
    started = time.monotonic()
    while not check():
        if time.monotonic() - started > seconds:
            raise SystemExit(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)
    return time.monotonic() - started


@contextmanager
def process(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        child = subprocess.Popen(argv, stdout=output, stderr=output)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


_nodes: dict[str, subprocess.Popen[bytes]] = {}


def hollow_nodes(stack: ExitStack, needed: int, directory: Path) -> None:
    """Starts some more than are needed, waits until enough are ready, and labels those."""
    program = str(kubernetes_binaries.kubemark())
    kubeconfig = os.environ["KUBECONFIG"]
    started = [f"hollow-{number}" for number in range(needed + _SPARE)]
    for number, name in enumerate(started):
        argv = [program, "--morph=kubelet", f"--name={name}", f"--kubeconfig={kubeconfig}",
                f"--kubelet-port={12250 + number}", f"--kubelet-read-only-port={12350 + number}"]  # fmt: skip
        _nodes[name] = stack.enter_context(process(argv, directory / "hollow.log"))
    stack.callback(lambda: kubectl("delete", "node", *started, "--ignore-not-found"))

    def ready() -> list[str]:
        return [
            node["metadata"]["name"]
            for node in json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
            if node["metadata"]["name"] in _nodes
            and any(item["type"] == "Ready" and item["status"] == "True" for item in node["status"]["conditions"])
        ]

    until("the hollow nodes are ready", lambda: len(ready()) >= needed, 600, 2.0)
    chosen = ready()
    kubectl("label", "node", *chosen, f"{_LABEL}=true", "--overwrite")
    for name in set(_nodes) - set(chosen):
        del _nodes[name]


def manifest(name: str, clients: int, **spec: Any) -> dict[str, Any]:
    template = {"spec": {"nodeSelector": {_LABEL: "true"}, "tolerations": [{"operator": "Exists"}],
                         "terminationGracePeriodSeconds": 1}}  # fmt: skip
    return {
        "apiVersion": "isthmus.dev/v1alpha1",
        "kind": "FederatedJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "rounds": 3,
            "task": {"image": "isthmus.lab/busybox:1", "command": ["sleep", "3600"]},
            "aggregator": {"template": template, "checkpoint": {"storage": "EmptyDir"}},
            "pools": [{"name": "cloud", "replicas": clients, "cloud": {"template": template}}],
            **spec,
        },
    }


class Operator:
    """What the operator's process uses, and how often it asks the API server."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def memory_mb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def requests(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{_METRICS}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        counts: dict[str, float] = {}
        for method, value in re.findall(r'isthmus_operator_api_requests_total\{.*?method="(\w+)"\} (\S+)', text):
            counts[method] = counts.get(method, 0) + float(value)
        return counts

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_HEALTH}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def running(job: str) -> int:
    """How many clients run."""
    if died := [name for name, node in _nodes.items() if node.poll() is not None]:
        raise SystemExit(f"{', '.join(died)} died, as hollow nodes do now and then: its pods cannot run; try again")
    fields = "--field-selector=status.phase=Running"
    try:
        return kubectl("-n", NAMESPACE, "get", "pods", "-l", f"isthmus.dev/job={job},isthmus.dev/role=client", fields,
                       "--no-headers", "-o", "name").count("\n")  # fmt: skip
    except KubectlError as error:
        # A busy API server may let one of our own looks wait too long.
        print(error, file=sys.stderr)
        return 0


def one_large_job(operator: Operator, clients: int, steady: float) -> dict[str, Any]:
    """A job of many clients: from apply until all run, then at rest."""
    before = operator.requests()
    started = time.monotonic()
    kubectl("apply", "-f", "-", stdin=manifest("large", clients))
    # Asked seldom: a list of a thousand pods is work for the API server too.
    until("all clients run", lambda: running("large") >= clients, 900, 2.0)
    seconds = time.monotonic() - started
    made = {method: count - before.get(method, 0) for method, count in operator.requests().items()}
    writes = sum(made.get(method, 0) for method in ("POST", "PATCH", "PUT", "DELETE"))
    # What was put off (counters in the status) is done by then.
    time.sleep(15)
    cpu, reads, since = operator.cpu(), operator.requests(), time.monotonic()
    time.sleep(steady)
    passed = time.monotonic() - since
    rest = {method: count - reads.get(method, 0) for method, count in operator.requests().items()}
    return {
        "clients": clients,
        "all_running_s": round(seconds, 1),
        "writes_per_client": round(writes / clients, 2),
        "reads_per_client": round(made.get("GET", 0) / clients, 2),
        "memory_mb": round(operator.memory_mb(), 1),
        "steady_cpu_percent": round(100 * (operator.cpu() - cpu) / passed, 2),
        "steady_requests_per_s": round(sum(rest.values()) / passed, 2),
    }


def many_idle_jobs(operator: Operator, jobs: int, steady: float) -> dict[str, Any]:
    """Suspended jobs: nothing runs for them."""
    started = time.monotonic()
    for first in range(0, jobs, 100):
        items = [manifest(f"idle-{number}", 2, suspend=True) for number in range(first, min(first + 100, jobs))]
        kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": items})

    def settled() -> bool:
        fields = "jsonpath={range .items[*]}{.status.phase}{'\\n'}{end}"
        return kubectl("-n", NAMESPACE, "get", "fj", "-o", fields).count("Suspended") >= jobs

    until("all of them are suspended", settled, 900, 2.0)
    seconds = time.monotonic() - started
    cpu, since = operator.cpu(), time.monotonic()
    time.sleep(steady)
    return {
        "idle_jobs": jobs,
        "settled_s": round(seconds, 1),
        "memory_mb": round(operator.memory_mb(), 1),
        "steady_cpu_percent": round(100 * (operator.cpu() - cpu) / (time.monotonic() - since), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1000, help="idle ones")
    parser.add_argument("--steady", type=float, default=60.0, help="seconds over which CPU is measured")
    options = parser.parse_args()
    Lab().require_up()
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder, ExitStack() as stack:
        directory = Path(folder)
        kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
        kubectl("create", "namespace", NAMESPACE)
        stack.callback(lambda: kubectl("delete", "namespace", NAMESPACE, "--wait=true", "--timeout=600s"))
        hollow_nodes(stack, -(-(options.clients + 1) // PODS_PER_NODE), directory)
        argv = [sys.executable, "-m", "isthmus_operator", "-n", NAMESPACE, "--cluster", "bench",
                "--metrics", f"127.0.0.1:{_METRICS}", "--health", f"127.0.0.1:{_HEALTH}"]  # fmt: skip
        child = stack.enter_context(process(argv, directory / "operator.log"))
        operator = Operator(child.pid)
        until("the operator is ready", operator.ready, 120)
        # While the operator is there: it is who lets the jobs go.
        stack.callback(lambda: kubectl("-n", NAMESPACE, "delete", "fj", "--all", "--timeout=600s"))
        result: dict[str, Any] = {"bench": "operator_scale", "idle_memory_mb": round(operator.memory_mb(), 1)}
        if options.clients:
            result["large_job"] = one_large_job(operator, options.clients, options.steady)
            kubectl("-n", NAMESPACE, "delete", "fj", "large", "--timeout=600s")
        if options.jobs:
            result["idle"] = many_idle_jobs(operator, options.jobs, options.steady)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
