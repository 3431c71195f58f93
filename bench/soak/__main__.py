"""Two jobs in alternation, one with hostile clients: ``python -m bench.soak [--rounds 200]``.

Eight honest clients with their own certificates train in each job. In one job, four more clients with valid
certificates (two to train, two to evaluate) run every attack of this folder in a loop. They are stopped during the
other job's turn and have the lowest priority, since their work would normally be on other machines. Prints a JSON
line; fails if a job does not complete, an update of an attack is accepted, or the two models differ.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from isthmus_contracts import identities

from ..harness.aggregator_process import DAY, POOL, UID, aggregator, client_environment
from ..harness.barrier import BarrierController
from ..harness.processes import family, program

HONEST = 8
HOSTILE = ("hostile-0", "hostile-1", "judge-0", "judge-1")
SPEC: dict[str, Any] = {
    "pools": [
        {"name": POOL, "replicas": HONEST, "cloud": {}},
        {"name": "hostile", "replicas": 2, "cloud": {}},
        {"name": "judge", "replicas": 2, "role": "Evaluate", "cloud": {}},
    ],
    # A round selects all clients. The number of updates that ends it is the number of honest clients.
    "selection": {"policy": "Random", "fraction": "0.8", "overSelect": "0.25", "minClients": HONEST},
    "strategy": {"algorithm": "FedAvg"},
    "objective": {"metric": "accuracy", "target": "0.9999"},
}
BOUND_BYTES = 700_000_000
"""Bound on the attacked aggregator's memory: 300 MB of its own, and 100 MB for each hostile client."""
ROUNDING = 1e-4
"""By which a weight may differ: updates are summed in the order in which they come. Of weights up to 0.5, three runs of
200 rounds without any hostile client differed by 1.4e-5 to 2.2e-5 from each other."""
PATIENCE_SECONDS = 900.0


class Side:
    """One job with its honest clients."""

    def __init__(self, stack: ExitStack, directory: Path, rounds: int) -> None:
        directory.mkdir()
        self.job = stack.enter_context(aggregator(directory, HONEST, rounds, **SPEC))
        self.tls = directory / "tls"
        for name in (*(f"{POOL}-{index}" for index in range(HONEST)), *HOSTILE):
            pool, _, index = name.rpartition("-")
            identity = identities.client_identity(UID, pool, int(index))
            self.job.authority.issue("client", DAY, uris=[identity]).write(self.tls / name)
        environment = client_environment(self.job)
        clients = stack.enter_context(
            program("bench.soak.honest", str(HONEST), str(self.tls), environment=environment)
        )  # fmt: skip
        self._barrier = BarrierController(clients, HONEST)
        self._barrier.await_all()
        self._clients = clients
        self.seconds: list[float] = []

    def turn(self, rounds: int) -> None:
        """Train this number of rounds."""
        self.seconds.append(self._barrier.run(rounds) / rounds)

    def conclude(self) -> torch.Tensor:
        """Train the last round and return the final model as one vector."""
        assert self._clients.stdin is not None
        self._clients.stdin.write(b".")
        model = self.job.directory / "state" / "model.safetensors"
        _until("the model is there", model.exists)
        return torch.cat([value.flatten() for _, value in sorted(load_file(model).items())])


class Attackers:
    """The hostile clients of a job."""

    def __init__(self, side: Side, process: "subprocess.Popen[bytes]") -> None:
        self._directory, self._process = side.tls.parent, process

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the hostile clients within this context."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def tallies(self) -> list[dict[str, Any]]:
        """Return the counts of each hostile client so far."""
        paths = [self._directory / f"{name}.json" for name in HOSTILE]
        return [json.loads(path.read_text()) if path.exists() else {"passes": 0} for path in paths]

    def await_passes(self) -> None:
        """Wait until each client has made all attacks once."""

        def made() -> bool:
            if self._process.poll() is not None:
                raise RuntimeError("the hostile clients have ended")
            return all(tally["passes"] for tally in self.tallies())

        _until("each has made all attacks", made)

    def _signal(self, number: signal.Signals) -> None:
        for pid in family(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def measure(rounds: int, turn: int) -> dict[str, Any]:
    """Run the two jobs and return the results."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        attacked, alone = (Side(stack, scratch / name, rounds) for name in ("attacked", "alone"))
        command = ("bench.soak.hostile", str(attacked.job.port), str(attacked.tls), *HOSTILE)
        attackers = Attackers(attacked, stack.enter_context(program(*command)))
        done = 0
        while done < rounds - 1:
            count = min(turn, rounds - 1 - done)
            attacked.turn(count)
            with attackers.paused():
                alone.turn(count)
            done += count
            print(f"{done} rounds: {attacked.seconds[-1]:.3f} s each, alone {alone.seconds[-1]:.3f} s", file=sys.stderr)
        attackers.await_passes()
        print("each hostile client has made all attacks", file=sys.stderr)
        model, expected = attacked.conclude(), alone.conclude()
        tallies = attackers.tallies()
        return {
            "clients": HONEST,
            "hostile": len(HOSTILE),
            "rounds": len({record["round"] for record in attacked.job.rounds}),
            "attacks": sum(sum(tally["made"].values()) for tally in tallies),
            "kinds": len({name for tally in tallies for name in tally["made"]}),
            "accepted": sum(tally["accepted"] for tally in tallies),
            "round_seconds": round(statistics.median(attacked.seconds), 4),
            "alone_seconds": round(statistics.median(alone.seconds), 4),
            "times_alone": round(
                statistics.median(
                    own / other for own, other in zip(attacked.seconds, alone.seconds, strict=True)
                ), 3
            ),
            "aggregator_peak_bytes": attacked.job.peak_memory(),
            "alone_peak_bytes": alone.job.peak_memory(),
            "log_bytes": (attacked.job.directory / "aggregator.log").stat().st_size,
            "difference": float((model - expected).abs().max()),
        }  # fmt: skip


def problems(line: dict[str, Any], rounds: int) -> list[str]:
    """Return a message for each violated limit."""
    checks = {
        f"{line['rounds']} of {rounds} rounds were committed": line["rounds"] == rounds,
        f"{line['accepted']} updates of hostile clients were accepted": not line["accepted"],
        f"the models differ by {line['difference']:g}": line["difference"] <= ROUNDING,
        f"the aggregator took {line['aggregator_peak_bytes']} bytes": line["aggregator_peak_bytes"] <= BOUND_BYTES,
    }
    return [problem for problem, holds in checks.items() if not holds]


def _until(what: str, holds: Any) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {PATIENCE_SECONDS:.0f} s: {what}")
        time.sleep(0.1)


def main() -> None:
    """Parse the command line, measure and print the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--turn", type=int, default=10, help="rounds of each job in a turn; medians over turns are shown"
    )
    options = parser.parse_args()
    line = measure(options.rounds, options.turn)
    print(json.dumps({"bench": "soak", **line}), flush=True)
    if found := problems(line, options.rounds):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main()
