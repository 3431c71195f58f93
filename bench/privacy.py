"""Accuracy under differential privacy: Fashion-MNIST on many clients, with increasing noise.

``python -m bench.privacy``: a JSON line for each number of clients, each noise multiplier (0: no privacy) and each kind
of noise: central (the aggregator's), clients (Skellam noise on the integers of a secure sum, without masks, sized for
two thirds of the clients), and adaptive (central noise, and a clipping norm that follows the updates). In this process,
through the real mechanisms and rules, without gRPC. The noise comes from the system's generator: no two runs are equal
to the last digit.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from isthmus.privacy import Adaptation, Private
from isthmus.secure_aggregation.fixed_point import Contribution, quantise
from isthmus.secure_aggregation.layout import Parameters
from isthmus.secure_aggregation.sum_rule import SecureSum
from isthmus.strategies import Strategy, Update
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_contracts.dp_accounting import Spent
from isthmus_contracts.dp_skellam import SkellamSpent, grid_of
from isthmus_contracts.secure_sums import threshold
from isthmus_examples.fashion_mnist import DEBIAN_DIRECTORY, load
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, Settings, evaluate

from .harness.simulation import Client, federate
from .strategies import halved

SETTINGS = Settings(epochs=2, learning_rate=0.1, batch_size=10)
LAST_ROUNDS = 5
CENTRAL, CLIENTS, ADAPTIVE = "central", "clients", "adaptive"


class Integers(Strategy):
    """Secure sum without masks: the updates are quantised here, with the clients' noise, as the clients do it."""

    def __init__(self, rule: SecureSum) -> None:
        self._rule = rule
        self._base: State = {}

    def begin(self, model: State) -> None:
        self._base = {name: tensor.clone() for name, tensor in model.items()}
        self._rule.arrange(self._base)
        self._rule.begin(self._base)

    def accept(self, update: Update) -> None:
        sent = quantise(self._rule.layout, self._base, update.tensors, Contribution(1))
        self._rule.accept(Update(update.client, 1, sent.tensors))

    def finish(self) -> State:
        self._rule.open()
        return self._rule.finish()


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", nargs="*", type=int, default=[100, 1000])
    parser.add_argument(
        "--noise", nargs="*", type=float, default=[0, 1, 2, 4, 8], help="noise multipliers; 0: no privacy"
    )
    parser.add_argument("--kinds", nargs="*", choices=[CENTRAL, CLIENTS, ADAPTIVE], default=[CENTRAL, CLIENTS])
    parser.add_argument("--clip", type=float, default=0.5, help="clipping norm; of the first round, if it is adaptive")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--examples", type=int, default=20, help="of each client")
    parser.add_argument("--alpha", type=float, default=1.0, help="alpha of the Dirichlet partition")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for clients in options.clients:
        for noise in options.noise:
            for kind in options.kinds if noise else [CENTRAL]:
                print(json.dumps({"bench": "privacy", **measure(clients, noise, kind, options)}), flush=True)


def measure(count: int, noise: float, kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the accuracy on the whole test set over the last rounds, and the privacy spent."""
    everyone, test = map(halved, load(Path(os.environ.get("FASHION_MNIST_DIR", DEBIAN_DIRECTORY))))
    accuracies, clipped, started = [], [], time.perf_counter()
    for seed in range(options.seeds):
        chosen = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))[
            : count * options.examples
        ]
        data = Examples(everyone.inputs[chosen], everyone.labels[chosen])
        shares = dirichlet_partition(data.labels.numpy(), count, options.alpha, seed=seed)
        clients = [
            Client(index, Examples(data.inputs[share], data.labels[share]), SETTINGS)
            for index, share in enumerate(shares)
        ]
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))
        mechanism: list[Private] = []

        def protect(rule: Strategy, mechanism: list[Private] = mechanism) -> Strategy:
            if not noise:
                return rule
            adaptation = Adaptation(0.5, 0.2, max(count / 20, noise), count) if kind == ADAPTIVE else None
            contributors = threshold(count) if kind == CLIENTS else 0
            mechanism.append(
                Private(rule, options.clip, noise, count, adaptation=adaptation, contributors=contributors)
            )
            if kind != CLIENTS:
                return mechanism[-1]
            return Integers(SecureSum(mechanism[-1], Parameters(max_clients=count, clip_norm=options.clip)))

        for number in federate(Spec(), model, clients, options.rounds, seed, protect):
            clipped += [private.clipped_ratio for private in mechanism]
            if number > options.rounds - LAST_ROUNDS:
                accuracies.append(evaluate(model, test)["accuracy"])
    private: dict[str, object] = {}
    if noise:
        epsilon = Spent().after(noise, options.rounds).epsilon(options.delta)
        if kind == CLIENTS:
            line = grid_of(32, count, noise, threshold(count)).line
            epsilon = SkellamSpent().after(line, sums=options.rounds).epsilon(options.delta)
        private = {"noise": kind, "epsilon": round(epsilon, 3), "delta": options.delta, "clip_norm": options.clip}
        private["last_clip_norm"] = round(mechanism[-1].clip_norm, 4)
        private["clipped"] = round(statistics.mean(clipped), 3)
    return {
        "clients": count,
        "noise_multiplier": noise,
        **private,
        "accuracy": round(statistics.mean(accuracies), 4),
        "rounds": options.rounds,
        "examples": options.examples,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    main()
