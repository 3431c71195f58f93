"""No-op rounds of Flower (also under SecAgg+) and NVFlare, and of Isthmus in the same run: ``python -m bench.peers``.

Each is installed from PyPI into its own virtual environment, once, and deployed as in its documentation:
Flower with a SuperLink and a SuperNode for each client, NVFlare in its proof-of-concept mode. A JSON line for each.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import secure
from ..rounds import Case, measure
from . import flower, nvflare
from .environments import environment
from .observed import Observed

# Cases of Isthmus, and the number of rounds of the others: these take seconds, and the first two do not count.
CASES = {
    "tiny": (Case(8, 10_000, 50, 3), 6),
    "medium": (Case(16, 2_500_000, 2, 3), 5),
    "large": (Case(4, 100_000_000, 1, 2), 4),
}


def plain_rounds(case: Case) -> dict[str, float]:
    """Return the rounds of Isthmus."""
    return measure(case, case.clients)


def secure_rounds(case: Case) -> dict[str, float]:
    """Return the rounds of Isthmus with secure aggregation."""
    found = secure.measure(secure.Case(case.clients, case.parameters, 2, 2, None), case.clients)
    return {"round_seconds": found["secure_seconds"], "aggregator_peak_bytes": found["aggregator_peak_bytes"]}


@dataclass(frozen=True)
class System:
    """Another framework, and the rounds of Isthmus to which its rounds are compared."""

    title: str
    environment: str
    run: Callable[[Path, int, int, int, Path], Observed]
    ours: Callable[[Case], dict[str, float]]


SYSTEMS = {
    "flower": System("Flower's SuperLink", "flower", flower.run, plain_rounds),
    "flower-secure": System("Flower's SecAgg+", "flower", flower.run_secure, secure_rounds),
    "nvflare": System("NVFlare", "nvflare", nvflare.run, plain_rounds),
}


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=["tiny", "medium"])
    parser.add_argument("--systems", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS))
    options = parser.parse_args()
    programs = {name: environment(SYSTEMS[name].environment) for name in options.systems}
    for name in options.cases:
        case, rounds = CASES[name]
        # Before each of the others, so that the background load is similar for all.
        for key, directory in programs.items():
            system = SYSTEMS[key]
            ours = system.ours(case)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                theirs = system.run(directory, case.clients, case.parameters, rounds, Path(scratch))
            print(json.dumps(line(case, system.title, ours, theirs)), flush=True)


def line(case: Case, title: str, ours: dict[str, float], theirs: Observed) -> dict[str, object]:
    """Return the result of one system and of Isthmus."""
    seconds, own = statistics.median(theirs.seconds), ours["round_seconds"]
    result: dict[str, object] = {
        "bench": "peers",
        "system": title,
        "clients": case.clients,
        "model_bytes": case.parameters * 4,
        "rounds": len(theirs.seconds),
        "round_seconds": round(seconds, 4),
        "isthmus_round_seconds": own,
        "times_isthmus": round(seconds / own, 1),
        "server_peak_bytes": theirs.server_peak,
        "isthmus_peak_bytes": ours["aggregator_peak_bytes"],
    }
    if "bare_grpc_seconds" in ours:  # not measured beside secure rounds
        result["bare_grpc_seconds"] = ours["bare_grpc_seconds"]
    return result


if __name__ == "__main__":
    main()
