"""A real aggregator whose clients are Slurm tasks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from isthmus_contracts import identities as ids
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.pki import Authority, Credentials

from .slurm_site import DAY, until

UID = "real-job"
SCRIPT = Path(__file__).parents[1] / "integration" / "federation" / "linear_model.py"


class Aggregator:
    """Aggregator for two clients of the pool `hpc`.

    It is one process at a time; after a restart it listens at the same port.
    """

    def __init__(self, folder: Path, address: str, rounds: int) -> None:
        self.server_name = ids.aggregator_server_name(UID)
        self.address, self.port = address, 0
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        job: dict[str, Any] = {
            "name": "real", "namespace": "default", "uid": UID,
            "spec": {
                "rounds": rounds, "task": {"image": "unused", "command": ["unused"], "config": {"rate": "0.1"}},
                "pools": [{"name": "hpc", "replicas": 2, "hpc": {"siteRef": {"name": "s"}, "environment": "any"}}],
            },
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        self.new_authority()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(120)

    def new_authority(self) -> None:
        """Give the job a new CA, and the aggregator a certificate from it."""
        self._authority = Authority.create("job", DAY)
        self._authority.issue("aggregator", DAY, hosts=[self.server_name]).write(self._folder / "server")

    def start(self) -> None:
        """Start the aggregator, and wait until it serves."""
        ports = self._folder / "ports.json"
        ports.unlink(missing_ok=True)
        with (self._folder / "aggregator.log").open("ab") as log:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.aggregator", "--job", "job.json", "--tls", "server", "--state", "state",
                 "--listen", f"{self.address}:{self.port}", "--metrics", "127.0.0.1:0", "--ports-file", "ports.json"],
                cwd=self._folder, stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: ports.exists() or process.poll() is not None, "the aggregator serves", 180)
        assert ports.exists(), self.log()
        self.port = int(json.loads(ports.read_text())["port"])

    def kill(self) -> None:
        """Kill the aggregator as the loss of its node would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(120)

    def rounds(self) -> int:
        """Return the number of committed rounds."""
        return len(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return the record of each round; a later line about a round replaces an earlier one."""
        file = self._folder / "state" / "rounds.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return list({record["round"]: record for record in map(json.loads, lines)}.values())

    def log(self) -> str:
        """Return the aggregator's log."""
        return (self._folder / "aggregator.log").read_text()

    def credentials(self) -> Credentials:
        """Issue credentials for a client."""
        return self._authority.issue("client", DAY, uris=[ids.pool_identity(UID, "hpc")])

    def federation(self, *, via_bridge: bool = False) -> pb.Federation:
        """Return the federation settings for the clients."""
        client = self.credentials()
        return pb.Federation(
            endpoint=f"{self.address}:{self.port}", server_name=self.server_name, via_bridge=via_bridge,
            ca_certificate=client.ca, certificate=client.certificate, private_key=client.key,
        )  # fmt: skip
