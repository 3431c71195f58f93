"""Handwritten digits with differential privacy of every single example: DP-SGD by Opacus (``pip install opacus``).

Each client clips the gradient of each example, and adds noise to every step. So its update, and all that follows from
it, is private for each of its examples, against the aggregator as well. The job's metric ``train_epsilon`` shows the
account. docs/training/privacy.md compares this with the privacy of whole clients.
"""

import os
import warnings

import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch.nn import functional
from torch.utils.data import TensorDataset

import isthmus
from isthmus_examples.digits import build, load
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, evaluate

DELTA = 1e-5
# Share of a client's examples in a step. The same for all clients, so that all have the same account.
SAMPLE_RATE = 0.1


def steps_of(epochs: int) -> int:
    """Return the number of steps in which each example is drawn this often on average."""
    return round(epochs / SAMPLE_RATE)


def epsilon(rounds: int, epochs: int, noise_multiplier: float) -> float:
    """Return the epsilon of one example after a number of rounds.

    It follows from the number of the round, so it is right after a restart, too. A client that was not selected in
    some rounds has spent less.
    """
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, SAMPLE_RATE, steps_of(epochs) * rounds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order of the divergences is the largest, or the smallest
        return float(accountant.get_epsilon(DELTA))


def train(module: GradSampleModule, data: Examples, optimizer: DPOptimizer, steps: int) -> float:
    """Take noisy steps on examples that are drawn independently (Poisson sampling). Return the mean loss."""
    loader = DPDataLoader(TensorDataset(data.inputs, data.labels), sample_rate=SAMPLE_RATE)
    module.train()
    losses, taken = [], 0
    while taken < steps:
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(module(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if len(labels):
                losses.append(loss.item())
            taken += 1
            if taken == steps:
                break
    return sum(losses) / max(len(losses), 1)


def main() -> None:
    """Train on this client's share in every round."""
    torch.set_num_threads(1)
    context = isthmus.context()
    everyones, held_out = load()
    alpha = float(os.environ.get("DIRICHLET_ALPHA", "0.3"))
    share = dirichlet_partition(everyones.labels.numpy(), context.clients, alpha)[context.client]
    data = Examples(everyones.inputs[share], everyones.labels[share])
    mine = slice(context.client, None, context.clients)
    measured = Examples(held_out.inputs[mine], held_out.labels[mine])

    model = build()
    module = GradSampleModule(model)
    for rnd in isthmus.rounds(model, evaluate=lambda: evaluate(model, measured)):
        epochs, noise = int(rnd.config.get("localEpochs", 1)), float(rnd.config.get("noiseMultiplier", 1))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=float(rnd.config.get("learningRate", 0.5))),
            noise_multiplier=noise,
            max_grad_norm=float(rnd.config.get("maxGradNorm", 1)),
            expected_batch_size=max(1, round(SAMPLE_RATE * len(data))),
        )
        # The strategy's correction is added to the noisy gradient, so it costs no privacy.
        rnd.wrap(optimizer)
        loss = train(module, data, optimizer, steps_of(epochs))
        # The loss is not private; a job that must not show it leaves it out.
        rnd.submit(num_examples=len(data), loss=loss, epsilon=epsilon(rnd.number, epochs, noise))


if __name__ == "__main__":
    main()
