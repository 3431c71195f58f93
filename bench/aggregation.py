"""Aggregation alone: a strategy's ``accept`` and torch's in-place add of the same tensors, in alternation.

``python -m bench.aggregation``: a JSON line for each strategy and size. The add reads two tensors and writes one, so
its time is the limit set by memory bandwidth.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from isthmus.strategies import Strategy, Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec

SIZES = (10_000, 1_000_000, 25_000_000, 100_000_000)
STRATEGIES = ("FedAvg", "FedAdam", "FedNova", "SCAFFOLD", "QFedAvg", "CoordinateMedian")
_SCALARS = {"steps": 10.0, "travel": 1.0, "loss": 1.0}
# Maximum elements of a tensor, as in a large model.
_TENSOR = 25_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--parameters", type=int, nargs="*", default=SIZES)
    parser.add_argument("--repeat", type=int, default=9, help="number of turns; medians are shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for parameters in options.parameters:
        for name in options.strategies:
            print(json.dumps(measure(name, parameters, options.repeat)), flush=True)


def measure(name: str, parameters: int, repeat: int) -> dict[str, object]:
    """Measure one strategy and size."""
    sizes = [_TENSOR] * (parameters // _TENSOR) + [parameters % _TENSOR] * (parameters % _TENSOR > 0)
    model: State = {f"w{number}": torch.zeros(size) for number, size in enumerate(sizes)}
    update = Update("pool/0", 10, {key: torch.rand_like(tensor) for key, tensor in model.items()}, scalars=_SCALARS)
    sums = {key: torch.zeros_like(tensor) for key, tensor in model.items()}

    def add() -> None:
        for key, total in sums.items():
            total.add_(update.tensors[key])

    with tempfile.TemporaryDirectory() as scratch:
        strategy: Strategy = make_strategy(Spec.model_validate({"algorithm": name}), Path(scratch), 8)
        strategy.begin(model)
        strategy.accept(update)
        add()
        own, limit = [], []
        times = max(1, 100_000 // parameters)  # many small ones, so that the time is measurable
        for _ in range(repeat):
            limit.append(seconds(add, times))
            own.append(seconds(lambda: strategy.accept(update), times))
        started = time.perf_counter()
        strategy.finish()
        finish = time.perf_counter() - started
    size = parameters * 4
    return {
        "bench": "aggregation",
        "strategy": name,
        "model_bytes": size,
        "accept_GBps": round(size / statistics.median(own) / 1e9, 3),
        "add_GBps": round(size / statistics.median(limit) / 1e9, 3),
        "of_add_rate": round(statistics.median(bare / mine for mine, bare in zip(own, limit, strict=True)), 3),
        "finish_seconds": round(finish, 5),
    }


def seconds(work: Callable[[], None], times: int) -> float:
    """Return the duration of one call."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


if __name__ == "__main__":
    main()
