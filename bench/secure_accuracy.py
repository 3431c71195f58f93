"""Accuracy under secure aggregation: digits on eight unequal clients, with and without it.

``python -m bench.secure_accuracy``: a JSON line for each strategy, with the accuracies of each seed. In this process,
through the client's quantisation, the masks and the aggregator's rules, without gRPC. ``--processes`` runs whole jobs
instead, with ``isthmus run``. The rounding is random: no two runs are equal to the last digit.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.codecs import Residual
from isthmus.secure_aggregation.fixed_point import Contribution, quantise
from isthmus.secure_aggregation.layout import Parameters, public_seed
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.sum_rule import SecureSum
from isthmus.strategies import Strategy, Update
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_examples.digits import DEFAULTS, build, load
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, evaluate

from .harness.simulation import Client, federate


class Masked(Strategy):
    """Clients that quantise and mask their updates, in front of the aggregator's secure sum."""

    def __init__(self, total: SecureSum) -> None:
        self._total = total
        self._model: State = {}
        self._keys: list[tuple[bytes, int]] = []
        self._round = 0
        self._residuals: dict[str, Residual | None] = {}
        self.clipped = 0.0
        """Largest share of clipped coordinates of a round."""

    def begin(self, model: State) -> None:
        self._model, self._keys, self._round = model, [], self._round + 1
        self._total.arrange(model, seed=public_seed("bench", self._round))
        self._total.begin(model)

    def accept(self, update: Update) -> None:
        contribution = Contribution(update.num_examples, update.scalars)
        residual = self._residuals.get(update.client)
        held = quantise(self._total.layout, self._model, update.tensors, contribution, residual=residual)
        self._residuals[update.client], masked = held.residual, held.tensors
        self._keys.append((secrets.token_bytes(32), 1))
        add_masks(masked, self._keys[-1:])
        self._total.accept(Update(update.client, 0, masked))

    def finish(self) -> State:
        self.clipped = max(self.clipped, self._total.unmask(self._keys).clipped_share)
        return self._total.finish()

    def companion(self) -> State:
        return self._total.companion()


def main() -> None:
    """Parse the command line and run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="*", default=["FedAvg", "SCAFFOLD"], metavar="NAME")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=0.3, help="alpha of the Dirichlet partition")
    parser.add_argument("--bits", type=int, choices=(16, 32), default=32)
    parser.add_argument("--max-examples", type=int, default=1_000_000)
    parser.add_argument("--rotation", action="store_true")
    parser.add_argument("--keep", type=float, default=0.0)
    parser.add_argument("--processes", action="store_true", help="run whole jobs, in processes of their own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.strategies:
        print(json.dumps({"bench": "secure_accuracy", **measure(name, options)}), flush=True)


def measure(algorithm: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the accuracies of the final models with and without secure aggregation, seed by seed."""
    started = time.perf_counter()
    plain, secure, clipped = [], [], 0.0
    for seed in range(options.seeds):
        if options.processes:
            plain.append(accuracy_of_job(algorithm, options, seed, {}))
            secure.append(accuracy_of_job(algorithm, options, seed, {"secureAggregation": settings(options)}))
            print(f"{algorithm}, seed {seed}: {plain[-1]:.4f} {secure[-1]:.4f}", file=sys.stderr)
            continue
        plain.append(accuracy(algorithm, options, seed, lambda rule: rule))
        made: list[Masked] = []

        def protect(rule: Strategy, made: list[Masked] = made) -> Strategy:
            parameters = Parameters(
                algorithm=algorithm, bits=options.bits, max_clients=options.clients, max_examples=options.max_examples,
                rotation=options.rotation, keep=options.keep,
            )  # fmt: skip
            made.append(Masked(SecureSum(rule, parameters)))
            return made[-1]

        secure.append(accuracy(algorithm, options, seed, protect))
        clipped = max(clipped, made[0].clipped)
    return {
        "strategy": algorithm,
        "ring": options.bits,
        "rotation": options.rotation,
        "keep": options.keep,
        "processes": options.processes,
        "plain_accuracies": [round(result, 4) for result in plain],
        "accuracies": [round(result, 4) for result in secure],
        "largest_difference": round(max(abs(one - other) for one, other in zip(plain, secure, strict=True)), 4),
        "accuracy": round(statistics.mean(secure), 4),
        **({} if options.processes else {"clipped": clipped}),
        "clients": options.clients,
        "rounds": options.rounds,
        "alpha": options.alpha,
        "seconds": round(time.perf_counter() - started, 1),
    }


def accuracy(algorithm: str, options: argparse.Namespace, seed: int, protect: Callable[[Strategy], Strategy]) -> float:
    """Return the accuracy of the final model on the held-out digits."""
    everyone, held_out = load()
    shares = dirichlet_partition(everyone.labels.numpy(), options.clients, options.alpha, seed=seed)
    clients = [
        Client(index, Examples(everyone.inputs[share], everyone.labels[share]), DEFAULTS)
        for index, share in enumerate(shares)
    ]
    model = build(seed)
    for _ in federate(Spec.model_validate({"algorithm": algorithm}), model, clients, options.rounds, seed, protect):
        pass
    return evaluate(model, held_out)["accuracy"]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the manifest's settings of secure aggregation."""
    chosen = {
        "bits": options.bits,
        "maxExamples": options.max_examples,
        "rotation": options.rotation,
        "metrics": {"eval_loss": "100"},
    }
    return chosen | ({"keep": str(options.keep)} if options.keep else {})


def accuracy_of_job(algorithm: str, options: argparse.Namespace, seed: int, privacy: dict[str, Any]) -> float:
    """Run a job and return the accuracy of its final model on the held-out digits."""
    environment = [{"name": "SEED", "value": str(seed)}, {"name": "DIRICHLET_ALPHA", "value": str(options.alpha)}]
    command = ["python", "-m", "isthmus_examples.digits"]
    manifest = {
        "apiVersion": "isthmus.dev/v1alpha1",
        "kind": "FederatedJob",
        "metadata": {"name": "digits"},
        "spec": {
            "rounds": options.rounds,
            "task": {"image": "localhost/isthmus-runtime", "command": command, "env": environment},
            "strategy": {"algorithm": algorithm},
            "privacy": privacy,
            "selection": {"minClients": options.clients},
            "pools": [{"name": "pool", "replicas": options.clients, "cloud": {}}],
        },
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "job.yaml").write_text(json.dumps(manifest), encoding="utf-8")
        run = [sys.executable, "-m", "isthmus", "run", "job.yaml", "--dir", "run"]
        process = subprocess.run(run, cwd=directory, env=os.environ, capture_output=True, text=True, check=False)
        if process.returncode:
            sys.exit(f"isthmus run failed ({process.returncode}): {process.stdout[-2000:]}{process.stderr[-2000:]}")
        model = build(seed)
        model.load_state_dict(torch.load(directory / "run/model.pt", weights_only=True))
    return evaluate(model, load()[1])["accuracy"]


if __name__ == "__main__":
    main()
