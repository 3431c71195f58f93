"""Fixtures for real aggregators and clients, as processes, over gRPC and mTLS on loopback."""

import datetime as dt
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import ObserverStub
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import channel

from . import subprocess_job
from .nursery import Nursery
from .subprocess_job import Forked

DAY = dt.timedelta(days=1)
UID = "5d2c"
POOL = "pool"
SERVER_NAME = identities.aggregator_server_name(UID)


def eventually(what: str, check: Callable[[], Any], seconds: float = 180.0) -> Any:
    """Return the first true value of ``check``, or fail with the name of the condition after the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := check():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


@dataclass
class Federation:
    """A job with its directory, certificate authority and processes."""

    directory: Path
    spec: dict[str, Any]
    authority: Authority = field(default_factory=lambda: Authority.create("test", DAY))
    port: int = 0
    metrics_port: int = 0
    processes: list[Forked] = field(default_factory=list)
    aggregator: Forked | None = None

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def credentials(self, index: int = 0, pool: str = POOL, uid: str = UID) -> Credentials:
        """Return the certificate of one client, or the one that an HPC pool's clients share."""
        shared = any(other["name"] == pool and "hpc" in other for other in self.spec["pools"])
        uri = identities.pool_identity(uid, pool) if shared else identities.client_identity(uid, pool, index)
        return self.authority.issue("client", DAY, uris=[uri])

    def start_aggregator(self, arguments: Sequence[Any] = (), *, wait: bool = True) -> None:
        """Start or restart the aggregator, on the same port each time."""
        job = {"name": "job", "namespace": "default", "uid": UID, "spec": self.spec}
        (self.directory / "job.json").write_text(json.dumps(job))
        if not (self.directory / "server").exists():
            self.authority.issue("aggregator", DAY, hosts=[SERVER_NAME]).write(self.directory / "server")
        ports = self.directory / "ports.json"
        ports.unlink(missing_ok=True)
        self.aggregator = self.start(
            "aggregator", ["-m", "isthmus.aggregator", "--job", "job.json", "--tls", "server", "--state", "state",
                           "--listen", f"127.0.0.1:{self.port}", "--metrics", "127.0.0.1:0", "--ports-file", ports,
                           *arguments], {},
        )  # fmt: skip
        if wait:
            self.wait_for_port()

    def wait_for_port(self) -> None:
        """Wait until the aggregator listens."""
        ports = self.directory / "ports.json"
        eventually("the aggregator listens", ports.exists)
        found = json.loads(ports.read_text())
        self.port, self.metrics_port = found["port"], found["metrics_port"]

    def start_client(
        self, script: Path, index: int = 0, attempt: int = 0, credentials: Credentials | None = None, **env: str
    ) -> Forked:
        """Start a client of the only pool."""
        return self.start(
            f"client-{index}-{attempt}", [script], self.client_environment(index, attempt, credentials, **env)
        )

    def client_environment(
        self, index: int = 0, attempt: int = 0, credentials: Credentials | None = None, **env: str
    ) -> dict[str, str]:
        """Return the environment of a client of the only pool, and write its certificate."""
        tls = self.directory / f"client-{index}-{attempt}"
        (credentials or self.credentials(index)).write(tls)
        return {
            identities.ENV_ENDPOINT: f"127.0.0.1:{self.port}",
            identities.ENV_SERVER_NAME: SERVER_NAME,
            identities.ENV_TLS_DIR: str(tls),
            identities.ENV_JOB_UID: UID,
            identities.ENV_POOL: POOL,
            identities.ENV_INDEX: str(index),
            identities.ENV_CLIENT: str(index),
            identities.ENV_CLIENTS: str(self.spec["pools"][0]["replicas"]),
            identities.ENV_POOL_SIZE: str(self.spec["pools"][0]["replicas"]),
            identities.ENV_ATTEMPT: str(attempt),
            **env,
        }

    def start(self, name: str, arguments: list[Any], env: dict[str, str]) -> Forked:
        """Start Python in a process that has already imported torch, with its output in ``NAME.log``."""
        log = self.directory / f"{name}.log"
        log.touch()
        process = subprocess_job.start([str(each) for each in arguments], self.directory, log, {**os.environ, **env})
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def status(self) -> pb.FederationStatus:
        observer = self.authority.issue("observer", DAY, uris=[identities.observer_identity(UID)])
        with channel(f"127.0.0.1:{self.port}", observer, SERVER_NAME) as connection:
            return ObserverStub(connection).GetStatus(pb.GetStatusRequest(job_uid=UID), timeout=60)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as answer:
            return str(answer.read().decode())

    def wait_for(self, what: Callable[[pb.FederationStatus], bool], seconds: float = 180.0) -> pb.FederationStatus:
        """Return the first status that fulfils the condition."""
        found: pb.FederationStatus = eventually("the status is so", lambda: what(s := self.status()) and s, seconds)
        return found

    def wait_for_round(self, number: int, seconds: float = 180.0) -> None:
        eventually(f"{number} rounds are complete", lambda: self.status().completed_rounds >= number, seconds)

    def wait_for_completion(self, seconds: float = 180.0) -> pb.FederationStatus:
        status: pb.FederationStatus = eventually(
            "training is complete", lambda: (s := self.status()).phase == pb.FederationStatus.COMPLETE and s, seconds
        )
        self.wait_for_exit()
        return status

    def wait_for_exit(self) -> None:
        assert self.aggregator is not None
        assert self.aggregator.wait() == 0, self.log("aggregator")

    def let_go(self) -> None:
        """Release the clients that linear_model.py holds (HOLD)."""
        (self.directory / "go").touch()

    def kill_aggregator(self) -> None:
        assert self.aggregator is not None
        self.aggregator.send_signal(signal.SIGKILL)
        self.aggregator.wait()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """Return a function that makes federations: ``federation(clients, rounds, **spec)``."""
    made: list[Federation] = []

    def make(clients: int, rounds: int, **spec: Any) -> Federation:
        full = {
            "rounds": rounds,
            "task": {"image": "unused", "command": ["python"], "config": {"rate": "0.1"}},
            "selection": {"minClients": clients},
            "pools": [{"name": POOL, "replicas": clients, "cloud": {}}],
            **spec,
        }
        directory = tmp_path / f"job{len(made)}"
        directory.mkdir()
        made.append(Federation(directory, full))
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Return the path of the training script: linear regression on data that depends on the client's number."""
    path = tmp_path / "train.py"
    path.write_text((Path(__file__).parent / "linear_model.py").read_text())
    return path


@pytest.fixture(scope="module")
def nurseries() -> Iterator[tuple[Nursery, Nursery]]:
    """Yield two processes that fork others: one for aggregators, one for clients."""
    pair = Nursery(), Nursery()
    yield pair
    for nursery in pair:
        nursery.close()
