"""Delay of an unrelated job while remote parties are dead: real gRPC servers that accept calls and never answer.

    python -m bench.dead_remotes [--jobs 100] [--aggregators 60] [--samples 4]

Runs the operator against the tests' stand-in API server, so it needs no cluster. Prints JSON lines: the seconds until
an unrelated job was accepted and until its aggregator ran, without dead parties, with jobs at a dead bridge, and with
silent aggregators.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.integration.operator.dead_remotes import DeadBridge, dead_site, hpc_job, silent_aggregators
from tests.integration.operator.fake_api_server import ApiServer
from tests.integration.operator.operator_process import Operator, accepted_after, job, until

_PAUSE = 8.0  # seconds between two samples


def _prepare_nothing(_: ApiServer, __: int) -> None:
    pass


def _prepare_bridge(api: ApiServer, count: int) -> None:
    dead_site(api, "dead", DeadBridge())
    api.idle.add("hpc")
    for number in range(count):
        api.put("federatedjobs", job(f"job{number}", **hpc_job("dead")), "hpc")


def _prepare_aggregators(api: ApiServer, count: int) -> None:
    silent_aggregators(api, "silent")
    for number in range(count):
        api.put("federatedjobs", job(f"job{number}"), "silent")


def measure(prepare: Callable[[ApiServer, int], None], count: int, samples: int) -> tuple[list[float], list[float]]:
    """Return the seconds until unrelated jobs were accepted, and until their aggregators ran."""
    with tempfile.TemporaryDirectory() as directory, ApiServer() as api:
        operator = Operator(api.kubeconfig(Path(directory) / "kubeconfig"), Path(directory) / "operator.log")
        try:
            operator.start("-A")
            prepare(api, count)
            accepted, running = [], []
            for number in range(samples):
                time.sleep(_PAUSE)
                name, began = f"other{number}", time.monotonic()
                accepted.append(round(accepted_after(api, "other", name, 900), 2))
                until(lambda: api.condition("other", name, "AggregatorReady").startswith("True"), "it runs", 600)  # noqa: B023
                running.append(round(time.monotonic() - began, 2))
            return accepted, running
        finally:
            operator.stop()


def main() -> None:
    """Measure all three cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--aggregators", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4)
    given = parser.parse_args()
    for what, prepare, count in (
        ("nothing", _prepare_nothing, 0),
        ("jobs at a dead bridge", _prepare_bridge, given.jobs),
        ("silent aggregators", _prepare_aggregators, given.aggregators),
    ):
        accepted, running = measure(prepare, count, given.samples)
        result = {"dead": what, "count": count, "accepted_s": accepted, "aggregator_runs_s": running}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
