"""No-op rounds of Flower (also under SecAgg+) and NVFlare, and of Isthmus in the same run: ``python -m bench.peers``.

Each is installed from PyPI into its own virtual environment, once, and deployed as in its documentation:
Flower with a SuperLink and a SuperNode for each client, NVFlare in its proof-of-concept mode. A JSON line for each.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import secure
from ..rounds import Case, measure
from . import flower, nvflare
from .environments import environment
from .observed import Observed

SECURE = "Flower's SecAgg+"
SYSTEMS: dict[str, tuple[str, str, Callable[[Path, int, int, int, Path], Observed]]] = {
    "flower": ("Flower's SuperLink", "flower", flower.run),
    "flower-secure": (SECURE, "flower", flower.run_secure),
    "nvflare": ("NVFlare", "nvflare", nvflare.run),
}
"""By name: title, environment, and function that runs its rounds."""
# Cases of Isthmus, and the number of rounds of the others: these take seconds, and the first two do not count.
CASES = {
    "tiny": (Case(8, 10_000, 50, 3), 6),
    "medium": (Case(16, 2_500_000, 2, 3), 5),
    "large": (Case(4, 100_000_000, 1, 2), 4),
}


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=["tiny", "medium"])
    parser.add_argument("--systems", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS))
    options = parser.parse_args()
    programs = {name: environment(SYSTEMS[name][1]) for name in options.systems}
    for name in options.cases:
        case, rounds = CASES[name]
        # Before each of the others, so that the background load is similar for all.
        for system, directory in programs.items():
            title, _, run = SYSTEMS[system]
            ours = measured(case, title == SECURE)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                theirs = run(directory, case.clients, case.parameters, rounds, Path(scratch))
            print(json.dumps(line(case, title, ours, theirs)), flush=True)


def measured(case: Case, secure_rounds: bool) -> dict[str, float]:
    """Return the rounds of Isthmus, with secure aggregation beside a system that has it."""
    if not secure_rounds:
        return measure(case, case.clients)
    found = secure.measure(secure.Case(case.clients, case.parameters, 2, 2, None), case.clients)
    return {"round_seconds": found["secure_seconds"], "aggregator_peak_bytes": found["aggregator_peak_bytes"]}


def line(case: Case, title: str, ours: dict[str, float], theirs: Observed) -> dict[str, object]:
    """Return the result of one system and of Isthmus."""
    seconds, own = statistics.median(theirs.seconds), ours["round_seconds"]
    result = {
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
    return result | {name: ours[name] for name in ("bare_grpc_seconds",) if name in ours}


if __name__ == "__main__":
    main()
