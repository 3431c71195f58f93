"""Many short jobs in sequence: does the operator release their memory?

    python -m lab up --only kubernetes
    python -m lab exec -- python -m bench.operator_soak [--jobs 600] [--wave 30]

In waves, on the lab's API server: a third completes (as a simulated kubelet reports), a third is
suspended, a third is still starting, and then all are deleted. After each wave, when its objects are gone
from the cluster, the benchmark reads the operator's stored jobs from its metrics, and memory, threads and files from
the kernel. Prints a JSON line; fails if anything of a job is kept.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab import Lab

from .cluster import simulated_pods
from .cluster.operator_process import Api, Operator, kubectl, manifest, namespace, operator, until

NAMESPACE = "bench-soak"
_THREADS = 4
_JOBS = f"/apis/isthmus.dev/v1alpha1/namespaces/{NAMESPACE}/federatedjobs"
_KINDS = ("complete", "suspended", "starting")
_OF_JOBS = ("jobs", "memories", "keys", "pods", "channels")
_LEFT = ("pods", "secrets", "configmaps", "services")


def wave(api: Api, running: Operator, number: int, size: int) -> dict[str, float]:
    """Run some jobs from creation to complete deletion, and return what the operator still keeps."""
    names = [f"{_KINDS[index % 3]}-{number}-{index}" for index in range(size)]
    kubelet = simulated_pods.Kubelet(api, NAMESPACE)
    with ThreadPoolExecutor(_THREADS) as threads:
        bodies = [manifest(name, NAMESPACE, 2, simulated_pods.TEMPLATE) for name in names]
        list(threads.map(lambda body: api.write("POST", _JOBS, body), bodies))
        to_suspend = [name for name in names if name.startswith("suspended")]
        until("they have begun", lambda: begun(api, to_suspend), 300)
        list(threads.map(lambda name: api.patch(f"{_JOBS}/{name}", {"spec": {"suspend": True}}), to_suspend))

        def settled() -> bool:
            kubelet.complete(lambda job: job.startswith("complete"))
            phases = {job["metadata"]["name"]: job.get("status", {}).get("phase") for job in api.jobs(NAMESPACE)}
            wanted = {"complete": "Complete", "suspended": "Suspended"}
            return all(phases[name] == wanted[kind] for name in names if (kind := name.split("-")[0]) in wanted)

        until("they are complete, or suspended", settled, 300)
        list(threads.map(lambda name: api.write("DELETE", f"{_JOBS}/{name}", {}), names))
    until("nothing is left of them", lambda: not left(api), 300)
    # kopf's own tasks for an object end some seconds after its last event.
    until("the operator has forgotten them", lambda: not kept_of_jobs(running), 120, show=lambda: kept_of_jobs(running))
    time.sleep(6)
    return {
        "memory_mb": running.memory_mb(),
        "tasks": running.value('isthmus_operator_kept{kind="tasks"}'),
        "threads": running.threads(),
        "files": running.files(),
    }


def begun(api: Api, names: list[str]) -> bool:
    """Return True if the operator has started these jobs."""
    phases = {job["metadata"]["name"]: job.get("status", {}).get("phase") for job in api.jobs(NAMESPACE)}
    return all(phases.get(name) == "Starting" for name in names)


def left(api: Api) -> int:
    """Return the operator's objects in the cluster."""
    query = "labelSelector=app.kubernetes.io/managed-by%3Disthmus-operator&limit=1"
    return sum(len(api.read(f"/api/v1/namespaces/{NAMESPACE}/{kind}?{query}")["items"]) for kind in _LEFT)


def kept_of_jobs(running: Operator) -> dict[str, float]:
    """Return the sizes of the operator's stores of jobs."""
    text = running.metrics()
    counts = {kind: running.value(f'isthmus_operator_kept{{kind="{kind}"}}', text) for kind in _OF_JOBS}
    return {kind: count for kind, count in counts.items() if count}


def soak(api: Api, running: Operator, jobs: int, size: int) -> dict[str, Any]:
    """Run all waves; the first third is the warm-up."""
    started, rows = time.monotonic(), []
    for number in range(-(-jobs // size)):
        row = wave(api, running, number, size)
        print(json.dumps({"wave": number, "s": round(time.monotonic() - started), **row}), file=sys.stderr, flush=True)
        rows.append(row)
    warm, last = rows[len(rows) // 3], rows[-1]
    since = (len(rows) - 1 - len(rows) // 3) * size
    return {
        "bench": "operator_soak",
        "jobs": len(rows) * size,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "after_first_mb": rows[0]["memory_mb"],
        "warm_mb": warm["memory_mb"],
        "last_mb": last["memory_mb"],
        "kb_per_job": round(1000 * (last["memory_mb"] - warm["memory_mb"]) / since, 2) if since else 0.0,
        **{f"{what}_warm": int(warm[what]) for what in ("tasks", "threads", "files")},
        **{f"{what}_last": int(last[what]) for what in ("tasks", "threads", "files")},
    }


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--wave", type=int, default=30, help="jobs per wave")
    options = parser.parse_args()
    Lab().require_up()
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder, namespace(NAMESPACE):
        with operator(NAMESPACE, Path(folder)) as running:
            result = soak(Api(), running, options.jobs, options.wave)
            kubectl("-n", NAMESPACE, "delete", "fj", "--all", "--timeout=300s")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
