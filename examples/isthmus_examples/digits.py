"""Handwritten digits (8x8, part of scikit-learn, no download) with a small network.

Every client computes the same Dirichlet split and takes its own share. This turns one data set into the unequal data
sets of a real federation. ``DIRICHLET_ALPHA`` sets how much the shares differ. ``SEED`` (a number, default 0) changes
the split, the initial weights and the order of the examples.
"""

import os

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import isthmus
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, Settings, evaluate, train

DEFAULTS = Settings(epochs=3, learning_rate=0.2, batch_size=16)


def load() -> tuple[Examples, Examples]:
    """Return the training and the held-out examples (a fifth of each class)."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, stratify=labels, random_state=0)
    inputs, held_out_inputs = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    labels, held_out_labels = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return Examples(inputs, labels), Examples(held_out_inputs, held_out_labels)


def build(seed: int = 0) -> nn.Module:
    """Return the network, with the same initial weights in every client."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def main() -> None:
    """Train on this client's share in every round."""
    torch.set_num_threads(1)  # more threads do not help so small a network
    context = isthmus.context()
    everyones, held_out = load()
    alpha = float(os.environ.get("DIRICHLET_ALPHA", "0.3"))
    seed = int(os.environ.get("SEED", "0"))
    share = dirichlet_partition(everyones.labels.numpy(), context.clients, alpha, seed=seed)[context.client]
    data = Examples(everyones.inputs[share], everyones.labels[share])
    # Each client measures on its own part of the held-out data: the weighted mean is the accuracy on all of it.
    mine = slice(context.client, None, context.clients)
    measured = Examples(held_out.inputs[mine], held_out.labels[mine])

    model = build(seed)
    for rnd in isthmus.rounds(model, evaluate=lambda: evaluate(model, measured)):
        settings = DEFAULTS.updated(rnd.config)
        optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=settings.learning_rate))
        loss = train(model, data, optimizer, settings, seed=(seed * 1000 + rnd.number) * 1_000_003 + context.client)
        rnd.submit(num_examples=len(data), loss=loss)


if __name__ == "__main__":
    main()
