"""Remaining clients of a run, and whether they are enough."""

from collections.abc import Sequence
from pathlib import Path

from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.pb import federation_pb2 as pb

from .plan import LocalClient


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 client``, ``2 clients``, ``3 processes``."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


class Roster:
    """The clients of a run, with those that failed or ended."""

    def __init__(self, job: FederatedJob, clients: Sequence[LocalClient]) -> None:
        self._spec = job.spec
        self.clients = clients
        self.failed: set[LocalClient] = set()
        """Clients given up after too many failures."""
        self.left: set[LocalClient] = set()
        """Clients that ended without an error."""
        self._first: dict[LocalClient, str] = {}
        self._newest = ""

    def note_failure(self, client: LocalClient, how: str) -> None:
        """Record that a client's process failed; ``how``: the last line of its output."""
        self._first.setdefault(client, how)
        self._newest = f"{client.name}: {how}" if how else ""

    @property
    def expected(self) -> int:
        """Number of clients that may take part; 0 if the manifest sets selection.minClients."""
        if self._spec.selection.min_clients is not None:
            return 0
        return len(self.clients) - len(self.failed) - len(self.left)

    def advice(self, connected: int, first_round: int, logs: Path) -> list[str]:
        """Return lines for a user whose first round has not started: the number of missing clients, and the remedy.

        ``logs``: the directory of the clients' logs, as shown to the user.
        """
        lines, least = [], self._spec.min_clients
        missing = len(self.clients) - len(self.failed) - len(self.left) - connected
        if missing > 0:
            late = counted(missing, "client")
            lines.append(f"still waiting for {late} to call isthmus.rounds(); the logs are in {logs}")
        if self.expected > least:
            lines.append(
                f"with selection.minClients: {least} in the manifest, round {first_round} starts without the others"
            )
        return lines

    @property
    def common_failure(self) -> str:
        """The last line of every client's first failure; empty if they differ, or a client has not failed."""
        lines = set(self._first.values())
        return lines.pop() if len(self._first) == len(self.clients) and len(lines) == 1 else ""

    def shortage(self, phase: "pb.FederationStatus.Phase.ValueType") -> str:
        """Return why the run cannot complete with the remaining clients; empty if it can."""
        if phase in (pb.FederationStatus.EVALUATING, pb.FederationStatus.COMPLETE):
            return ""
        spec, trainers = self._spec, [c for c in self.clients if self._spec.pool(c.pool).role == "Train"]
        remaining = [c for c in trainers if c not in self.failed and c not in self.left]
        waiting = phase in (pb.FederationStatus.WAITING, pb.FederationStatus.INITIALIZING)
        needed = max(spec.min_updates, spec.min_clients) if waiting else spec.min_updates
        if len(remaining) >= needed:
            return ""
        failed, left = len(self.failed.intersection(trainers)), len(self.left.intersection(trainers))
        gone = [f"{failed} failed"] if failed or not left else []
        gone += [f"{left} ended without an error"] if left else []
        which = "clients" if len(trainers) == len(self.clients) else "clients that train"
        text = f"{len(remaining)} of {len(trainers)} {which} remain ({', '.join(gone)}) where a round needs {needed}"
        if failed and self._newest:
            return f"{text}; {self._newest}"
        if left and not failed:
            return f"{text}; does the script loop over isthmus.rounds() until training is complete?"
        return text
