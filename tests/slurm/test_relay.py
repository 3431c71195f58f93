"""Clients in a network without a route out train through the bridge's relay, with real Slurm, aggregator and TLS.

This also works where the bridge accepts no connection from outside and dials the operator's gateway.
"""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from tests.support.ports import free_port

from .aggregator import SCRIPT, UID, Aggregator
from .gateway import Gateway
from .slurm_site import Site, ensure, over, spec, tail

if TYPE_CHECKING:
    from lab import Lab

ROUNDS = 2
# Fails if the aggregator's own address can be reached; otherwise runs the training script.
CHECK = """
import os, runpy, socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
except OSError as error:
    print("no way:", error, flush=True)
else:
    sys.exit("the aggregator can be reached without the relay")
runpy.run_path(sys.argv[3], run_name="__main__")
"""


@pytest.fixture
def island(lab: "Lab") -> Iterator[str]:
    """Yield an isolated network namespace whose only neighbour, at 10.77.0.1, is the bridge's machine."""
    name = f"island-{secrets.token_hex(3)}"
    link = name[-8:]
    commands = (
        ["netns", "add", name],
        ["-n", name, "link", "set", "lo", "up"],
        ["link", "add", link, "type", "veth", "peer", "name", "login", "netns", name],
        ["address", "add", "10.77.0.1/24", "dev", link],
        ["link", "set", link, "up"],
        ["-n", name, "address", "add", "10.77.0.2/24", "dev", "login"],
        ["-n", name, "link", "set", "login", "up"],
    )
    try:
        for command in commands:
            subprocess.run(["ip", *command], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.fixture
def aggregator(lab: "Lab", tmp_path: Path) -> Iterator[Aggregator]:
    with Aggregator(tmp_path, lab.node_address, ROUNDS) as one:
        yield one


@pytest.fixture
def root_site(lab: "Lab", island: str) -> Iterator[Site]:
    """Yield a bridge that runs as root, since only root can move a job into another network namespace."""
    port = free_port("10.77.0.1")
    one = Site(Path(tempfile.mkdtemp(prefix="bridge-test-")), None, Path(sys.executable), {})
    one.settings["environments"]["island"] = {
        "prefix": ["nsenter", f"--net=/run/netns/{island}", "--"], "env_denied": [],
    }  # fmt: skip
    one.settings["relay"] = {
        "listen": f"10.77.0.1:{port}", "address": f"10.77.0.1:{port}", "destinations": [f"{lab.node_address}:*"],
    }  # fmt: skip
    yield one
    one.close()


def train(operator: rpc.BridgeStub, site: Site, aggregator: Aggregator) -> None:
    """Train with a pool in the isolated network until it completes."""
    key = site.key()
    command = [sys.executable, "-c", CHECK, aggregator.address, str(aggregator.port), str(SCRIPT)]
    wanted = spec(
        job_uid=UID, replicas=2, first_client=0, total_clients=2, environment="island", command=command,
        memory_mib=500, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    wanted.federation.CopyFrom(aggregator.federation(via_bridge=True))
    ensure(operator, key, wanted)
    pool = over(operator, key, 400)
    logs = [tail(operator, key, index) for index in range(2)]
    assert pb.Pool.Phase.Name(pool.phase) == "SUCCEEDED", (pool, logs)
    assert all("no way:" in log for log in logs)
    assert aggregator.rounds() == ROUNDS


def test_a_pool_without_a_way_out_trains_through_the_relay(root_site: Site, aggregator: Aggregator) -> None:
    train(root_site.start(), root_site, aggregator)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """Yield the operator's gateway."""
    one = Gateway(tmp_path)
    yield one
    one.close()


def test_the_relay_works_where_the_bridge_dials_out(root_site: Site, aggregator: Aggregator, gateway: Gateway) -> None:
    gateway.admit(root_site)
    root_site.start()
    relay = root_site.settings["relay"]["listen"]
    assert root_site.listens() == [relay], "nothing but the relay, inside the site, takes connections"
    root_site.address = gateway.connected()
    train(root_site.stub(cluster="prod"), root_site, aggregator)
