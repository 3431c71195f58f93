"""Smoke test of a running lab: all functions that the project's tests rely on, in about half a minute."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from lab.cluster import KUBERNETES, SLURM, Lab
from lab.machine.errors import LabError, say
from lab.software.images import BUSYBOX

NAMESPACE = "lab-check"
GREETING = "hello from the volume"


def run(lab: Lab) -> None:
    """Check the running parts. Raises LabError with the first function that does not work."""
    lab.require_up()
    checks = {KUBERNETES: _kubernetes, SLURM: _slurm}
    parts = [part for part in checks if lab.running(part)]
    if not parts:
        raise LabError("neither Kubernetes nor Slurm runs; start them with `python -m lab up`")
    for part in parts:
        checks[part](lab)
    say(f"check: {' and '.join(parts)} work")


def _kubernetes(lab: Lab) -> None:
    _output(lab, ["kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found"])
    try:
        _pods(lab)
    finally:
        _output(lab, ["kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found"])
    _until("the volume's directory is removed with its claim", lambda: not any(lab.paths.volumes.iterdir()))
    _report("helm", _output(lab, ["helm", "version", "--short"]))
    _report("helm3", _output(lab, ["helm3", "version", "--short"]))


def _pods(lab: Lab) -> None:
    def kubectl(*words: str, text: str | None = None) -> str:
        return _output(lab, ["kubectl", "--namespace", NAMESPACE, *words], text)

    _output(lab, ["kubectl", "create", "namespace", NAMESPACE])
    kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": _objects()}))
    kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=300s")
    _report("storage", kubectl("get", "pvc", "data", "-o", "jsonpath={.status.phase} to {.spec.volumeName}"))
    _expect("kubectl logs", kubectl("logs", "server"), "serving")
    _expect("kubectl exec", kubectl("exec", "client", "--", "cat", "/etc/resolv.conf"), lab.node_address)

    def fetch(pod: str, url: str) -> list[str]:
        return ["kubectl", "--namespace", NAMESPACE, "exec", pod, "--", "wget", "-qO-", url]

    by_name = f"http://web.{NAMESPACE}.svc:8080/index.html"
    _expect_answer(lab, "a Service by name, from a pod", fetch("client", by_name))
    _expect_answer(lab, "a headless Service by name, from a pod", fetch("client", "http://members:8080/index.html"))
    _expect_answer(lab, "a pod's own Service, from itself", fetch("server", "http://web:8080/index.html"))
    service = kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}")
    address, node_port = service.split()
    urls = {
        "a ClusterIP, from the lab's network": f"http://{address}:8080/index.html",
        "a NodePort, from the lab's network": f"http://{lab.node_address}:{node_port}/index.html",
    }
    for what, url in urls.items():
        _expect_answer(lab, what, ["python3", "-c", _FETCH, url])
    _expect_answer(lab, "a NodePort, from a pod", fetch("client", urls["a NodePort, from the lab's network"]))


_FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


def _objects() -> list[dict[str, Any]]:
    """Return a claim, a pod that writes a file to it and serves it, two Services of that pod, and a client pod."""
    serve = f"echo '{GREETING}' > /data/index.html && echo serving && exec httpd -f -p 8080 -h /data"
    ports = [{"port": 8080, "targetPort": 8080}]
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web"},
            "spec": {"type": "NodePort", "selector": {"app": "server"}, "ports": ports},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "members"},
            "spec": {"clusterIP": "None", "selector": {"app": "server"}, "ports": ports},
        },
        _pod("server", serve, {"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}}),
        _pod("client", "exec sleep 600", {}),
    ]


def _pod(name: str, script: str, extra: dict[str, Any]) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", script],
        # An unprivileged pod, like those of the project.
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        **extra,
    }
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532},
        "containers": [container],
    }
    if name == "server":
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def _slurm(lab: Lab) -> None:
    """Run a job array on both nodes as the unprivileged user, and check its accounting."""
    script = "#!/bin/sh\nsleep 5\necho $(id -un) $SLURM_ARRAY_TASK_ID $SLURMD_NODENAME\n"
    # The tasks together need more cores than one node has, so that both nodes are used.
    name = f"lab-check-{secrets.token_hex(4)}"
    options = ["--parsable", "--array=0-1", "--cpus-per-task=3", f"--job-name={name}", "--output=lab-check-%a.out"]
    submitted = lab.run(["sbatch", *options], lab.user, input=script, text=True, cwd=lab.home, capture_output=True)
    if submitted.returncode:
        raise LabError(f"sbatch failed: {submitted.stderr.strip()}")
    # Completion records have each task's own job id, so that only the name finds all tasks of an array.
    accounting = ["sacct", "--completion", "--noheader", "--parsable2", "--format=JobID,JobName,State,NodeList"]
    states: list[str] = []

    def completed() -> bool:
        states[:] = [line for line in _output(lab, accounting).splitlines() if f"|{name}|" in line]
        return sum("|COMPLETED|" in state for state in states) == 2

    _until("two tasks are completed", completed, lambda: f"sacct says {states}")
    outputs = [lab.home / f"lab-check-{task}.out" for task in (0, 1)]
    lines = [path.read_text().strip() for path in outputs]
    for path in outputs:
        path.unlink()
    nodes = {line.split()[2] for line in lines}
    if nodes != {"n1", "n2"}:
        raise LabError(f"the array did not use both nodes: {lines}")
    _report("a job array on both nodes", "; ".join(lines))
    _report("sacct -c", " ".join(states))


def _output(lab: Lab, argv: list[str], text: str | None = None) -> str:
    result = lab.run(argv, input=text, capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"`{' '.join(argv)}` failed: {result.stderr.strip() or result.stdout.strip()}")
    return str(result.stdout).strip()


def _until(what: str, holds: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        if time.monotonic() > deadline:
            raise LabError(f"check: not after 180 s: {what}; {explain()}")
        time.sleep(0.2)


def _expect_answer(lab: Lab, what: str, argv: list[str]) -> None:
    """Wait for the greeting: DNS and kube-proxy learn of a Service after a moment."""
    said: list[str] = [""]

    def answered() -> bool:
        result = lab.run(argv, capture_output=True, text=True)
        said[0] = f"{result.stdout}{result.stderr}"
        return result.returncode == 0 and GREETING in result.stdout

    _until(what, answered, lambda: said[0])
    _report(what, "works")


def _expect(what: str, found: str, wanted: str) -> None:
    if wanted not in found:
        raise LabError(f"check: {what}: expected {wanted!r}, found {found!r}")
    _report(what, "works")


def _report(what: str, result: str) -> None:
    say(f"check: {what}: {' '.join(result.split())}")
