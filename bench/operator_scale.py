"""Operator at scale, on the lab's API server and hollow nodes (real kubelets with a fake container runtime).

    python -m lab up --only kubernetes
    python -m lab exec -- python -m bench.operator_scale [--clients 1000] [--jobs 1000]

Prints JSON lines. In alternation, a job of many clients and the same pods created by 8 threads: seconds
from apply until all pods are created, scheduled and running; the operator's requests per client, its memory and its
processor time when idle. Then many idle jobs, half suspended and half complete, before and after a restart of the
operator.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab import Lab

from .cluster import simulated_pods
from .cluster.hollow_nodes import AGGREGATOR, TEMPLATE, HollowNodes, hollow_nodes
from .cluster.operator_process import WRITES, Api, Operator, PodTimes, kubectl, manifest, namespace, operator, until

NAMESPACE = "bench-operator"
_THREADS = 8
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_OWN = ("pods", "federatedjobs", "services", "secrets", "configmaps", "networkpolicies", "poddisruptionbudgets")
# Fields that the API server adds to a pod or that tie it to a job: removed to create similar pods.
_GIVEN = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "ownerReferences", "selfLink")


class StatusTime:
    """Time at which the status first reports that every client of a job runs (none is queued)."""

    def __init__(self, api: Api, job: str, clients: int) -> None:
        self.moment: float | None = None
        self._last: Any = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(api, job, clients), daemon=True)
        self._thread.start()

    def _look(self, api: Api, job: str, clients: int) -> None:
        while self.moment is None and not self._ended.wait(0.5):
            pools = api.job(NAMESPACE, job).get("status", {}).get("pools") or [{}]
            self._last = pools[0]
            if pools[0].get("desired") == clients and pools[0].get("queued") == 0:
                self.moment = time.monotonic()

    def wait(self, seconds: float) -> float:
        """Wait for that time and return it."""
        self._thread.join(seconds)
        self._ended.set()
        if self.moment is None:
            raise SystemExit(f"not within {seconds:.0f} s after all pods ran: the status says so ({self._last})")
        return self.moment


def large_job(api: Api, running: Operator, clients: int, seconds: float) -> dict[str, Any]:
    """Measure from apply until all clients run."""
    before, counted, cpu = running.requests(), api.counted(_OWN), running.cpu()
    times = PodTimes(api, NAMESPACE, "isthmus.dev/role=client")
    started = time.monotonic()
    kubectl("apply", "-f", "-", stdin=manifest("large", NAMESPACE, clients, TEMPLATE, AGGREGATOR))
    said = StatusTime(api, "large", clients)
    result: dict[str, Any] = times.until_running(clients, started, seconds)
    result["status_says_so_s"] = round(said.wait(60) - started, 1)
    times.close()
    # Deferred writes (counters in the status, events) are done by then.
    time.sleep(10)
    made = {method: count - before.get(method, 0) for method, count in running.requests().items()}
    result["writes_per_client"] = round(sum(made.get(method, 0) for method in WRITES) / clients, 3)
    # Writes of all clients, including kubectl's, but no events.
    result["writes_per_client_by_the_api_server"] = round((api.counted(_OWN) - counted) / clients, 3)
    result["reads_per_client"] = round(made.get("GET", 0) / clients, 3)
    result["cpu_s"] = round(running.cpu() - cpu, 1)
    result["peak_memory_mb"] = running.memory_mb("VmHWM")
    return result


def pattern(api: Api) -> dict[str, Any]:
    """Return a client's pod without the fields that are specific to one pod."""
    body = copy.deepcopy(api.read(f"{_PODS}/large-cloud-0-0"))
    body["metadata"] = {key: value for key, value in body["metadata"].items() if key not in _GIVEN}
    body["metadata"]["labels"] = {"bench": "bare"}
    del body["status"], body["spec"]["nodeName"]
    return {"apiVersion": "v1", "kind": "Pod", **body}


def bare(api: Api, body: dict[str, Any], clients: int, seconds: float) -> dict[str, float]:
    """Create the same pods in threads, without an operator, and measure."""
    pods = [copy.deepcopy(body) for _ in range(clients)]
    for index, pod in enumerate(pods):
        pod["metadata"]["name"] = f"bare-{index}"
    times = PodTimes(api, NAMESPACE, "bench=bare")
    started = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda pod: api.write("POST", _PODS, pod), pods))
    result = times.until_running(clients, started, seconds)
    times.close()
    return result


def turn(api: Api, running: Operator, nodes: HollowNodes, options: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    """Measure one large job, and the same pods without an operator."""
    clients = options.clients
    ours = large_job(api, running, clients, options.patience)
    ours |= running.at_rest(options.steady)
    body = pattern(api)
    # The pods mount the job's Secret and remain after the job.
    secret = api.read(f"/api/v1/namespaces/{NAMESPACE}/secrets/large-cloud-tls")
    secret["metadata"] = {"name": "large-cloud-tls"}
    kubectl("-n", NAMESPACE, "delete", "fj", "large", "--timeout=600s")
    none_left(api)
    kubectl("-n", NAMESPACE, "create", "-f", "-", stdin={"apiVersion": "v1", "kind": "Secret", **secret})
    theirs = bare(api, body, clients, options.patience)
    kubectl("-n", NAMESPACE, "delete", "pods", "-l", "bench=bare", "--wait=false")
    none_left(api)
    kubectl("-n", NAMESPACE, "delete", "secret", "large-cloud-tls")
    nodes.check()
    return ours, theirs


def none_left(api: Api) -> None:
    """Wait until no pod is left, so that a turn does not affect the next."""

    def gone() -> bool:
        return not api.read(f"{_PODS}?limit=1")["items"]

    until("all pods are gone", gone, 600, 1.0)


def turns(api: Api, running: Operator, nodes: HollowNodes, options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of several turns."""
    pairs = []
    for number in range(options.turns):
        ours, theirs = turn(api, running, nodes, options)
        print(json.dumps({"turn": number, "operator": ours, "bare": theirs}), file=sys.stderr, flush=True)
        pairs.append((ours, theirs))
    result: dict[str, Any] = {"bench": "operator_scale", "clients": options.clients, "turns": options.turns}
    for key in pairs[0][0]:
        result[key] = round(statistics.median(ours[key] for ours, _ in pairs), 3)
    for key in pairs[0][1]:
        result[f"bare_{key}"] = round(statistics.median(theirs[key] for _, theirs in pairs), 1)
    result["times_bare"] = round(
        statistics.median(ours["running_s"] / theirs["running_s"] for ours, theirs in pairs), 2
    )
    return result


def idle_jobs(api: Api, jobs: int) -> float:
    """Create jobs, half suspended and half complete; return the seconds until all are in that state."""
    path = f"/apis/isthmus.dev/v1alpha1/namespaces/{NAMESPACE}/federatedjobs"
    bodies = [
        manifest(f"idle-{number}", NAMESPACE, 2, simulated_pods.TEMPLATE, suspend=bool(number % 2))
        for number in range(jobs)
    ]
    kubelet = simulated_pods.Kubelet(api, NAMESPACE)

    def settled() -> bool:
        kubelet.complete(lambda job: True)
        phases = [job.get("status", {}).get("phase") for job in api.jobs(NAMESPACE)]
        return phases.count("Suspended") + phases.count("Complete") >= jobs

    started = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda body: api.write("POST", path, body), bodies))
    # Poll rarely: each poll lists all jobs and pods.
    until("all of them are idle", settled, 1200, 2.0)
    # Clients of complete jobs have half a minute to exit.
    until("the clients are gone", lambda: not active(api), 300, 2.0)
    return round(time.monotonic() - started, 1)


def active(api: Api) -> int:
    """Return the existing client pods."""
    found = api.read(f"{_PODS}?labelSelector=isthmus.dev/role%3Dclient&resourceVersion=0")
    return len(found["items"])


def many_idle_jobs(api: Api, directory: Path, jobs: int, steady: float) -> dict[str, Any]:
    """Measure many idle jobs before and after a restart of the operator."""
    result: dict[str, Any] = {"bench": "operator_idle", "jobs": jobs}
    with operator(NAMESPACE, directory) as running:
        result["idle_s"] = idle_jobs(api, jobs)
        result |= running.at_rest(steady)
        result["peak_memory_mb"] = running.memory_mb("VmHWM")
        result["memory_mb"] = running.memory_mb()
    started = time.monotonic()
    with operator(NAMESPACE, directory) as running:
        result["restart_ready_s"] = round(time.monotonic() - started, 1)

        def looked() -> bool:
            text = running.metrics()
            looks = running.value("isthmus_operator_reconcile_seconds_count", text)
            busy = running.value("isthmus_operator_queue_depth", text)
            busy += running.value("isthmus_operator_workers_busy", text)
            return looks >= jobs and not busy

        until("every job was reconciled", looked, 600)
        result["restart_all_looked_at_s"] = round(time.monotonic() - started, 1)
        result |= {f"restarted_{key}": value for key, value in running.at_rest(steady).items()}
        result["restarted_memory_mb"] = running.memory_mb()
        result["restarted_peak_memory_mb"] = running.memory_mb("VmHWM")
    return result


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="clients of the large job; 0: none")
    parser.add_argument(
        "--turns", type=int, default=1, help="number of turns, each with a large job and with pods alone"
    )
    parser.add_argument("--jobs", type=int, default=1000, help="number of idle jobs; 0: none")
    parser.add_argument("--steady", type=float, default=60.0, help="seconds over which CPU is measured")
    parser.add_argument("--patience", type=float, default=600.0, help="timeout for pods in seconds")
    options = parser.parse_args()
    Lab().require_up()
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder, namespace(NAMESPACE):
        directory, api = Path(folder), Api()
        if options.clients:
            with (
                hollow_nodes(options.clients + 1, directory) as nodes,
                operator(NAMESPACE, directory) as running,
            ):
                print(json.dumps(turns(api, running, nodes, options)), flush=True)
        if options.jobs:
            print(json.dumps(many_idle_jobs(api, directory, options.jobs, options.steady)), flush=True)


if __name__ == "__main__":
    main()
