"""Hollow nodes on the lab's API server: real kubelets with a fake container runtime."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lab.kubernetes.config import NODE_NAME
from lab.software import kubernetes_binaries

from .operator_process import kubectl, process, until

# A node takes 110 pods; pods of an earlier turn may still be terminating.
PODS_PER_NODE = 84
_LABEL = "isthmus.dev/hollow"
_FIRST_PORT = 12250

# Settings that place pods on hollow nodes only.
TEMPLATE: dict[str, Any] = {
    "spec": {
        "nodeSelector": {_LABEL: "true"},
        "tolerations": [{"operator": "Exists"}],
        "terminationGracePeriodSeconds": 1,
    }
}

# The aggregator runs on the lab's real node, as a process with an address that does not speak gRPC. The address of a
# hollow pod is unreachable, and each reconciliation of the job would wait for it.
AGGREGATOR: dict[str, Any] = {
    "spec": {
        "nodeSelector": {"kubernetes.io/hostname": NODE_NAME},
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "aggregator", "command": ["httpd", "-f", "-p", "7443"]}],
    }
}


class HollowNodes:
    """Running hollow nodes."""

    def __init__(self, nodes: dict[str, "subprocess.Popen[bytes]"], directory: Path) -> None:
        self._nodes = nodes
        self._directory = directory

    def check(self) -> None:
        """Exit if a node has ended."""
        for name, child in self._nodes.items():
            if child.poll() is not None:
                log = (self._directory / name / "log").read_text(errors="replace")
                raise SystemExit(f"{name} ended ({child.returncode}): {log[-3000:]}")

    def ready(self) -> bool:
        """Return True if all nodes are ready."""
        self.check()
        nodes = json.loads(kubectl("get", "nodes", "-l", f"{_LABEL}=true", "-o", "json"))["items"]
        ready = [
            node
            for node in nodes
            if any(item["type"] == "Ready" and item["status"] == "True" for item in node["status"]["conditions"])
        ]
        return len(ready) >= len(self._nodes)


@contextmanager
def hollow_nodes(pods: int, directory: Path) -> Iterator[HollowNodes]:
    """Start enough hollow nodes for this number of pods, and yield them when all are ready."""
    program = str(kubernetes_binaries.kubemark())
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    number = -(-pods // PODS_PER_NODE)
    with ExitStack() as stack:
        names = [f"hollow-{index}" for index in range(number)]
        kubectl("delete", "node", *names, "--ignore-not-found")
        stack.callback(lambda: kubectl("delete", "node", *names, "--ignore-not-found"))
        for index, name in enumerate(names):
            own = directory / name
            own.mkdir()
            argv = [program, "--morph=kubelet", f"--name={name}", f"--kubeconfig={os.environ['KUBECONFIG']}",
                    f"--kubelet-port={_FIRST_PORT + index}", f"--kubelet-read-only-port={_FIRST_PORT + 100 + index}",
                    f"--node-labels={_LABEL}=true"]  # fmt: skip
            # The socket of its runtime and its volumes are in its own directory, and are removed with it.
            nodes[name] = stack.enter_context(process(argv, own / "log", TMPDIR=str(own)))
        started = HollowNodes(nodes, directory)
        until("the hollow nodes are ready", started.ready, 300, 2.0)
        yield started
