"""Whole no-op rounds, compared with bare gRPC streams and bare TCP of the same bytes, in alternation in one run.

``python -m bench.rounds``: a JSON line for each of the named cases; ``--clients 8 --parameters 10000`` defines
another case. A round is timed from the release of its clients until all have the next model.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from .harness import grpc_baseline, tcp_baseline
from .harness.aggregator_process import aggregator, client_environment
from .harness.barrier import BarrierController
from .harness.processes import processor_seconds, program


@dataclass(frozen=True)
class Case:
    """Number of clients, float32 parameters, turns and rounds per turn.

    A few rounds before them do not count: they allocate memory and the files of the kept checkpoints."""

    clients: int
    parameters: int
    rounds: int
    turns: int


WARM_UP = 6


CASES = {
    "tiny": Case(8, 10_000, 50, 9),
    "medium": Case(16, 2_500_000, 3, 7),
    "large": Case(4, 100_000_000, 1, 5),
    "thousand": Case(1000, 10_000, 1, 7),
}


@dataclass
class Series:
    """Measurements of one system by turn: seconds and processor seconds of a round."""

    barrier: BarrierController
    pids: tuple[int, ...]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def turn(self, rounds: int) -> None:
        before = processor_seconds(*self.pids)
        self.seconds.append(self.barrier.run(rounds) / rounds)
        self.processor.append((processor_seconds(*self.pids) - before) / rounds)

    def times(self, other: "Series") -> float:
        """Return the ratio of the round's duration to the other system's: the median over the turns."""
        return statistics.median(own / bare for own, bare in zip(self.seconds, other.seconds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--clients", type=int, help="clients of another case")
    parser.add_argument("--parameters", type=int, default=10_000, help="float32 parameters of the model")
    parser.add_argument("--rounds", type=int, help="of each turn")
    parser.add_argument("--turns", type=int, help="turns of each system; medians are shown")
    parser.add_argument("--processes", type=int, help="processes of the clients; default: one each, at most 16")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases}
    if options.clients:
        cases = {"own": Case(options.clients, options.parameters, 10, 7)}
    for name, case in cases.items():
        chosen = Case(case.clients, case.parameters, options.rounds or case.rounds, options.turns or case.turns)
        line = {"bench": "rounds", "case": name, **measure(chosen, min(options.processes or 16, case.clients))}
        print(json.dumps(line), flush=True)


def measure(case: Case, processes: int) -> dict[str, float]:
    """Return the result of one case."""
    size = case.parameters * 4
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        job = stack.enter_context(aggregator(Path(scratch), case.clients, case.turns * case.rounds + WARM_UP + 1))
        clients = stack.enter_context(
            program("bench.harness.noop_clients", str(case.clients), str(processes), str(case.parameters),
                    environment=client_environment(job))
        )  # fmt: skip
        barrier = BarrierController(clients, case.clients)
        barrier.await_all()
        wire = stack.enter_context(grpc_baseline.running(job, case.clients, processes, size))
        raw = stack.enter_context(tcp_baseline.running(case.clients, processes, size))
        ours = Series(barrier, (job.aggregator.pid, clients.pid))
        theirs, socket = Series(wire.barrier, wire.pids), Series(raw.barrier, raw.pids)
        for series in (ours, theirs, socket):
            series.barrier.run(WARM_UP)
        for _ in range(case.turns):
            for series in (theirs, ours, socket):
                series.turn(case.rounds)
        peak, checkpoint = job.peak_memory(), job.stage_seconds("checkpoint")
    return {
        "clients": case.clients,
        "model_bytes": size,
        "rounds": case.turns * case.rounds,
        "round_seconds": round(statistics.median(ours.seconds), 5),
        "bare_grpc_seconds": round(statistics.median(theirs.seconds), 5),
        "tcp_seconds": round(statistics.median(socket.seconds), 5),
        "of_bare_grpc_rate": round(1 / ours.times(theirs), 3),
        "times_bare_grpc": round(ours.times(theirs), 3),
        "times_tcp": round(ours.times(socket), 3),
        "processor_seconds": round(statistics.median(ours.processor), 5),
        "bare_grpc_processor_seconds": round(statistics.median(theirs.processor), 5),
        "checkpoint_seconds": round(checkpoint, 5),
        "aggregator_peak_bytes": peak,
    }


if __name__ == "__main__":
    main()
