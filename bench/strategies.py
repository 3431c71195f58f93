"""All strategies on Fashion-MNIST with unequal data, compared with central training on the same examples.

``python -m bench.strategies``: a JSON line for each. Runs in this process with the real strategies and the
client library's corrections, without gRPC. Asynchronous ones run in virtual time, with clients of different speeds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from torch.nn import functional

from isthmus_contracts.api.strategy import Algorithm
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_examples.fashion_mnist import DEBIAN_DIRECTORY, load
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, Settings, evaluate, train

from .harness.simulation import Client, federate

CENTRAL = "central"
# Parameters for which the defaults do not fit this task.
PARAMETERS: Mapping[str, dict[str, str]] = {
    "FedProx": {"mu": "0.1"},
    "QFedAvg": {"q": "0.1", "learningRate": "1"},
    "FedBuff": {"bufferSize": "5"},
}
SETTINGS = Settings(epochs=1, learning_rate=0.05, batch_size=64)
# With such different data the accuracy varies from round to round: the result is the mean over the last rounds.
LAST_ROUNDS = 10


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    everything = [CENTRAL, *(name for name in get_args(Algorithm) if name != "Custom")]
    parser.add_argument("--strategies", nargs="*", choices=everything, default=everything, metavar="NAME")
    parser.add_argument("--parameters", nargs="*", metavar="NAME=VALUE", help="of the strategies")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--examples", type=int, default=2000, help="examples of training data, over all clients")
    parser.add_argument("--alpha", type=float, default=0.1, help="alpha of the Dirichlet partition")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.strategies:
        print(json.dumps({"bench": "strategies", "strategy": name, **measure(name, options)}), flush=True)


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the accuracy on the whole test set, over the last rounds and after the last one."""
    everyone, test = map(halved, load(Path(os.environ.get("FASHION_MNIST_DIR", DEBIAN_DIRECTORY))))
    parameters = dict(item.split("=") for item in options.parameters or ()) or PARAMETERS.get(name, {})
    settled, final, started = [], [], time.perf_counter()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        chosen = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))[: options.examples]
        data = Examples(everyone.inputs[chosen], everyone.labels[chosen])
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))
        if name == CENTRAL:
            course = centrally(model, data, options.rounds, seed)
        else:
            shares = dirichlet_partition(data.labels.numpy(), options.clients, options.alpha, seed=seed)
            clients = [
                Client(index, Examples(data.inputs[share], data.labels[share]), SETTINGS)
                for index, share in enumerate(shares)
            ]
            spec = Spec.model_validate({"algorithm": name, "parameters": parameters})
            course = federate(spec, model, clients, options.rounds, seed)
        accuracies = [evaluate(model, test)["accuracy"] for number in course if number > options.rounds - LAST_ROUNDS]
        settled.append(statistics.mean(accuracies))
        final.append(accuracies[-1])
    return {
        "parameters": parameters,
        "accuracy": round(statistics.mean(settled), 4),
        "accuracies": [round(result, 4) for result in settled],
        "final_accuracy": round(statistics.mean(final), 4),
        "rounds": options.rounds,
        "clients": options.clients,
        "examples": options.examples,
        "alpha": options.alpha,
        "seconds": round(time.perf_counter() - started, 1),
    }


def halved(data: Examples) -> Examples:
    """Return the pictures as vectors of 14 x 14 pixels, normalized to mean 0 and deviation 1 over the data set."""
    pixels = functional.avg_pool2d(data.inputs, 2).flatten(1)
    return Examples((pixels - 0.286) / 0.33, data.labels)


def centrally(model: nn.Module, data: Examples, rounds: int, seed: int) -> Iterator[int]:
    """Train on all data, one epoch per round; yield the number of each round."""
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS.learning_rate)
    for number in range(1, rounds + 1):
        train(model, data, optimizer, SETTINGS, seed=seed * 1000 + number)
        yield number


if __name__ == "__main__":
    main()
