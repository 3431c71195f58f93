"""A real aggregator, whose clients are Slurm's tasks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pki import Authority

from .site import DAY, until

UID = "slurm-job"
SCRIPT = Path(__file__).parents[1] / "integration" / "federation" / "linear.py"


class Aggregator:
    """A real one, for two clients of the pool `hpc`; they find it at ``address``."""

    def __init__(self, folder: Path, address: str, rounds: int) -> None:
        self.authority = Authority.create("job", DAY)
        self.server_name = ids.aggregator_server_name(UID)
        self.authority.issue("aggregator", DAY, hosts=[self.server_name]).write(folder / "server")
        self._folder = folder
        job: dict[str, Any] = {
            "name": "relayed", "namespace": "default", "uid": UID,
            "spec": {
                "rounds": rounds, "task": {"image": "unused", "command": ["unused"], "config": {"rate": "0.1"}},
                "pools": [{"name": "hpc", "replicas": 2, "hpc": {"siteRef": {"name": "s"}, "environment": "plain"}}],
            },
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        with (folder / "aggregator.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.aggregator", "--job", "job.json", "--tls", "server", "--state", "state",
                 "--listen", f"{address}:0", "--metrics", "127.0.0.1:0", "--ports-file", "ports.json"],
                cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip
        ports = folder / "ports.json"
        until(lambda: ports.exists() or self.process.poll() is not None, "the aggregator serves", 180)
        assert ports.exists(), (folder / "aggregator.log").read_text()
        self.address, self.port = address, int(json.loads(ports.read_text())["port"])

    def rounds(self) -> int:
        """How many it has committed."""
        return len({record["round"] for record in self.records()})

    def records(self) -> list[dict[str, Any]]:
        """What each round came to; a later line about a round replaces the one before."""
        file = self._folder / "state" / "rounds.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        found = {}
        for line in lines:
            record = json.loads(line)
            found[record["round"]] = record
        return list(found.values())

    def log(self) -> str:
        """Its words."""
        return (self._folder / "aggregator.log").read_text()

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait(120)

    def federation(self, *, via_bridge: bool = False) -> pb.Federation:
        """What the clients need."""
        client = self.authority.issue("client", DAY, uris=[ids.client_identity(UID, "hpc")])
        return pb.Federation(
            endpoint=f"{self.address}:{self.port}", server_name=self.server_name, via_bridge=via_bridge,
            ca_certificate=client.ca, certificate=client.certificate, private_key=client.key,
        )  # fmt: skip
