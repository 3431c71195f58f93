"""Secure rounds beside plain ones, in alternation in one run: ``python -m bench.secure``.

A JSON line for each of the named cases; ``--clients 8 --parameters 10000`` defines another one. A job without secure
aggregation and one with it have the same clients, which train nothing or wait for ``--training`` seconds. Rounds are
timed while they follow each other without a pause, since a client makes the masks of a round while it trains.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isthmus_contracts.wire.parties import Trust, issue, new_root, write_party_files

from .harness.aggregator_process import POOL, UID, Job, aggregator, client_environment, peak_memory
from .harness.barrier import BarrierController
from .harness.processes import family, processor_seconds, program

PARTY = "bench"
# Beyond the processes' start, every wait in these rounds is for a processor that others use.
_PHASE_SECONDS = 600
_POLL_SECONDS = 0.02
_QUIET_SECONDS = 0.3
# Memory of an aggregator that does not depend on the number of clients (docs/design/benchmarks.md, Memory).
_BOUND_MODELS, _BOUND_BYTES = 2.5, 400_000_000


@dataclass(frozen=True)
class Case:
    """Clients, float32 parameters, timed rounds per turn, turns, and the largest ratio that is good enough."""

    clients: int
    parameters: int
    rounds: int
    turns: int
    bound: float | None
    dropouts: float = 0.0
    """Share of the clients that take part in the exchange of keys and never hand in."""
    training: float = 0.0
    """Seconds that each client waits in the place of training."""


CASES = {
    "tiny": Case(8, 10_000, 20, 7, 5.0),
    "medium": Case(16, 2_500_000, 3, 7, 2.0),
    "large": Case(4, 100_000_000, 1, 5, 1.5),
    "dropouts": Case(64, 2_500_000, 1, 5, 3.0, dropouts=0.1),
    "trained": Case(16, 2_500_000, 3, 5, 1.1, training=1.0),
    "thousand": Case(1000, 10_000, 1, 3, None),
}


@dataclass
class Series:
    """Rounds of one job: seconds and processor seconds of a round, by turn."""

    job: Job
    clients: int
    barrier: BarrierController
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def turn(self, rounds: int) -> None:
        """Run one round, and then this number of timed ones, each from commit to commit."""
        pids = (self.job.aggregator.pid, self.clients)
        first = len(self.job.rounds)
        before = processor_seconds(*pids)
        self.barrier.release(rounds + 1)
        while len(records := self.job.rounds) <= first + rounds:
            if self.job.aggregator.poll() is not None:
                raise RuntimeError("the aggregator has ended")
            time.sleep(_POLL_SECONDS)
        settle(*pids)
        self.seconds.append((records[first + rounds]["time"] - records[first]["time"]) / rounds)
        self.processor.append((processor_seconds(*pids) - before) / (rounds + 1))

    def client_peak(self) -> int:
        """Return the largest peak memory of a process of clients, in bytes."""
        peaks = []
        for pid in family(self.clients) - {self.clients}:
            with suppress(OSError):
                peaks.append(peak_memory(pid))
        return max(peaks)


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(prog="python -m bench.secure", description=__doc__)
    bounded = [name for name, case in CASES.items() if case.bound is not None]  # the others take very long
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=bounded)
    parser.add_argument("--clients", type=int, help="clients of another case")
    parser.add_argument("--parameters", type=int, default=10_000, help="float32 parameters of its model")
    parser.add_argument("--dropouts", type=float, default=0.0, help="share of its clients that drop out")
    parser.add_argument("--training", type=float, help="seconds that each client waits before its update")
    parser.add_argument("--rounds", type=int, help="timed rounds of each turn")
    parser.add_argument("--turns", type=int, help="turns of each job; medians are shown")
    parser.add_argument("--processes", type=int, help="processes of the clients; default: one each, at most 16")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases}
    if options.clients:
        cases = {"own": Case(options.clients, options.parameters, 3, 5, None, options.dropouts)}
    for name, case in cases.items():
        changes = {"rounds": options.rounds, "turns": options.turns, "training": options.training}
        chosen = replace(case, **{field: value for field, value in changes.items() if value is not None})
        line = {"bench": "secure", "case": name, **measure(chosen, min(options.processes or 16, case.clients))}
        print(json.dumps(line), flush=True)


def measure(case: Case, processes: int) -> dict[str, Any]:
    """Return the result of one case."""
    size = case.parameters * 4
    with ExitStack() as stack:
        plain, secure = (
            stack.enter_context(running(case, processes, protection))
            for protection in ({}, {"secureAggregation": {"phaseDeadlineSeconds": _PHASE_SECONDS}})
        )
        for _ in range(case.turns):
            for series in (plain, secure):
                series.turn(case.rounds)
        peaks, client_peaks = ([series.job.peak_memory() for series in (plain, secure)],
                               [series.client_peak() for series in (plain, secure)])  # fmt: skip
    times = statistics.median(ours / other for ours, other in zip(secure.seconds, plain.seconds, strict=True))
    bound_bytes = int(_BOUND_MODELS * size + _BOUND_BYTES)
    line = {
        "clients": case.clients,
        "model_bytes": size,
        "dropouts": case.dropouts,
        "training_seconds": case.training,
        "rounds": case.turns * case.rounds,
        "plain_seconds": round(statistics.median(plain.seconds), 5),
        "secure_seconds": round(statistics.median(secure.seconds), 5),
        "times_plain": round(times, 3),
        "plain_processor_seconds": round(statistics.median(plain.processor), 4),
        "secure_processor_seconds": round(statistics.median(secure.processor), 4),
        "plain_aggregator_peak_bytes": peaks[0],
        "aggregator_peak_bytes": peaks[1],
        "of_memory_bound": round(peaks[1] / bound_bytes, 3),
        "plain_client_peak_bytes": client_peaks[0],
        "client_peak_bytes": client_peaks[1],
    }
    return line if case.bound is None else line | {"bound": case.bound, "within_bound": times <= case.bound}


@contextmanager
def running(case: Case, processes: int, privacy: dict[str, Any]) -> Iterator[Series]:
    """Start a job and its clients, which wait at the barrier of its first round."""
    spec: dict[str, Any] = {"privacy": privacy} if privacy else {}
    silent = round(case.clients * case.dropouts)
    if silent:
        # The round ends with the other clients' updates, without waiting for a deadline.
        taken = case.clients - silent
        spec["selection"] = {
            "minClients": taken, "policy": "Random", "fraction": f"{taken / case.clients:.6f}",
            "overSelect": f"{case.clients / taken - 1:.6f}",
        }  # fmt: skip
        spec["stragglers"] = {"minUpdates": taken}
    # The turns' rounds, the one before each, and one that the clients wait in.
    rounds = case.turns * (case.rounds + 1) + 1
    with tempfile.TemporaryDirectory() as scratch, aggregator(Path(scratch), case.clients, rounds, **spec) as job:
        join_party(job)
        arguments = map(str, (case.clients, processes, case.parameters, case.training, silent))
        with program("bench.harness.noop_clients", *arguments, environment=client_environment(job)) as clients:
            barrier = BarrierController(clients, case.clients - silent)  # the first round may begin without the others
            barrier.await_all()
            yield Series(job, clients.pid, barrier)


def settle(*pids: int) -> None:
    """Wait until the processes have nothing left to do, so that they do not disturb the next turn."""
    used = processor_seconds(*pids)
    while True:
        time.sleep(_QUIET_SECONDS)
        before, used = used, processor_seconds(*pids)
        if used - before <= 0.1 * _QUIET_SECONDS:
            return


def join_party(job: Job) -> None:
    """Give the job's clients a signing key, its credential and a trust file, all of one party."""
    root, public = new_root()
    key, credential = issue(root, PARTY, UID, POOL)
    write_party_files(job.directory / "client", key, credential, Trust(roots={PARTY: public}))


if __name__ == "__main__":
    main()
