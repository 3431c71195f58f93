"""The operator as a process, and small manifests for it."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.support.ports import free_port

from .fake_api_server import ApiServer

T = TypeVar("T")


def until(check: Callable[[], T], what: str, seconds: float = 120.0) -> T:
    """Wait for the first true value of ``check``, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return value


@dataclass
class Operator:
    """One operator process."""

    kubeconfig: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    metrics_port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)

    def start(self, *options: str) -> None:
        """Start the operator, and wait until it is ready."""
        command = [
            sys.executable, "-m", "isthmus_operator", "--resync", "1", "--metrics", f"127.0.0.1:{self.metrics_port}",
            "--health", f"127.0.0.1:{self.health_port}", *options,
        ]  # fmt: skip
        environment = {"KUBECONFIG": str(self.kubeconfig), "PATH": os.environ["PATH"], "HOME": str(self.log.parent)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until(lambda: self.probe("/readyz") == 200, "the operator is ready")

    def probe(self, path: str) -> int:
        """Return the HTTP status of a probe; 0 without a response."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        """Return a metric's value; 0 if it does not exist. ``name``: with its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def stop(self) -> None:
        """Stop the operator."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)


def job(name: str, **spec: Any) -> dict[str, Any]:
    """Return a FederatedJob with one client."""
    content = {
        "rounds": 3,
        "task": {"image": "img", "command": ["python", "t.py"]},
        "aggregator": {"checkpoint": {"storage": "EmptyDir"}},
        "pools": [{"name": "cloud", "replicas": 1, "cloud": {}}],
        **spec,
    }
    return {"metadata": {"name": name}, "spec": content}


def accepted_after(api: ApiServer, namespace: str, name: str, seconds: float = 300.0) -> float:
    """Create a job, and return after how many seconds it is accepted."""
    began = time.monotonic()
    api.put("federatedjobs", job(name), namespace)
    until(lambda: api.condition(namespace, name, "Accepted") == "True/Valid", f"{name} is accepted", seconds)
    return time.monotonic() - began
