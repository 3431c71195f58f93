"""Aggregator process with real credentials, for benchmarks on loopback."""

import datetime as dt
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from isthmus_contracts import identities
from isthmus_contracts.wire import transport
from isthmus_contracts.wire.pki import Authority, Credentials

UID, POOL = "bench", "pool"
SERVER_NAME = identities.aggregator_server_name(UID)
DAY = dt.timedelta(days=1)


@dataclass
class Job:
    """Processes and credentials of one job."""

    directory: Path
    authority: Authority
    client: Credentials
    aggregator: subprocess.Popen[bytes]
    port: int
    metrics_port: int

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Return the records of the committed rounds."""
        try:
            lines = (self.directory / "state" / "rounds.jsonl").read_text().splitlines()
        except FileNotFoundError:  # before the first round
            return []
        return [json.loads(line) for line in lines]

    def stage_seconds(self, stage: str) -> float:
        """Return the mean time of a stage so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        totals: dict[str, float] = defaultdict(float)
        for sample in (sample for family in families for sample in family.samples):
            if sample.labels.get("stage") == stage:
                totals[sample.name] += sample.value
        return totals["isthmus_stage_seconds_sum"] / totals["isthmus_stage_seconds_count"]

    def peak_memory(self) -> int:
        """Return the peak memory of the aggregator in bytes."""
        return peak_memory(self.aggregator.pid)


def peak_memory(pid: int) -> int:
    """Return the largest resident set of a process so far, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")


@contextmanager
def aggregator(directory: Path, clients: int, rounds: int, **spec: Any) -> Iterator[Job]:
    """Start an aggregator for ``clients`` clients of one pool; stop it at the end."""
    authority = Authority.create("bench", DAY)
    authority.issue("aggregator", DAY, hosts=[SERVER_NAME]).write(directory / "server")
    client = authority.issue("client", DAY, uris=[identities.pool_identity(UID, POOL)])
    client.write(directory / "client")
    job = {
        "name": "bench",
        "namespace": "default",
        "uid": UID,
        "spec": {
            "rounds": rounds,
            "task": {"image": "unused", "command": ["unused"]},
            "selection": {"minClients": clients},
            # A kind of pool whose clients share a certificate.
            "pools": [{"name": POOL, "replicas": clients, "hpc": {"siteRef": {"name": "x"}, "environment": "x"}}],
            **spec,
        },
    }
    (directory / "job.json").write_text(json.dumps(job))
    ports = directory / "ports.json"
    with (directory / "aggregator.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus.aggregator", "--job", "job.json", "--tls", "server", "--state", "state",
             "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--ports-file", ports],
            cwd=directory, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        while not ports.exists():
            if process.poll() is not None:
                raise RuntimeError((directory / "aggregator.log").read_text())
            time.sleep(0.02)
        found = json.loads(ports.read_text())
        yield Job(directory, authority, client, process, found["port"], found["metrics_port"])
    finally:
        process.terminate()
        process.wait()


def connections_of_their_own() -> None:
    """Give every channel of this process its own connection. By default gRPC shares one connection between channels
    with the same target."""
    transport._CHANNEL_OPTIONS.append(("grpc.use_local_subchannel_pool", 1))


def client_environment(job: Job) -> dict[str, str]:
    """Return the environment that the library's sessions read; the client's index is in its context."""
    return {
        **os.environ,
        identities.ENV_ENDPOINT: f"127.0.0.1:{job.port}",
        identities.ENV_SERVER_NAME: SERVER_NAME,
        identities.ENV_TLS_DIR: str(job.directory / "client"),
        identities.ENV_JOB_UID: UID,
        identities.ENV_POOL: POOL,
    }
