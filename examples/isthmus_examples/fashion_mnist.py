"""Fashion-MNIST (Xiao et al. 2017; 28x28 pictures of clothes): with a small convolutional network.

The four files come from ``ISTHMUS_DATA`` (a site's data set), ``FASHION_MNIST_DIR``, or where Debian's package
dataset-fashion-mnist installs them. ``EXAMPLES`` takes a random part of the training data, for quick runs.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

import isthmus
from isthmus_examples.idx import IdxError, read_idx
from isthmus_examples.partition import dirichlet_partition
from isthmus_examples.training import Examples, Settings, evaluate, train

DEFAULTS = Settings(epochs=1, learning_rate=0.05, batch_size=32)
DEBIAN_DIRECTORY = "/usr/share/datasets/fashion-mnist"


def load(directory: Path) -> tuple[Examples, Examples]:
    """Return the training and the held-out examples. Exits with one line if a file is missing or damaged."""
    try:
        train_set, held_out = (
            (read_idx(directory / f"{part}-images-idx3-ubyte"), read_idx(directory / f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        )
    except IdxError as error:
        hint = "install Debian's package dataset-fashion-mnist, or set FASHION_MNIST_DIR"
        raise SystemExit(f"Fashion-MNIST: {error}; {hint}") from None
    return _examples(*train_set), _examples(*held_out)


def _examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    inputs = torch.from_numpy(images.astype(np.float32) / 255.0).unsqueeze(1)
    return Examples(inputs, torch.from_numpy(labels.astype(np.int64)))


def build() -> nn.Module:
    """Return the network, with the same initial weights in every client."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    """Train on this client's share in every round."""
    context = isthmus.context()
    everyones, held_out = load(Path(context.data or os.environ.get("FASHION_MNIST_DIR", DEBIAN_DIRECTORY)))
    if limit := int(os.environ.get("EXAMPLES", "0")):
        chosen = torch.randperm(len(everyones), generator=torch.Generator().manual_seed(0))[:limit]
        everyones = Examples(everyones.inputs[chosen], everyones.labels[chosen])
    alpha = float(os.environ.get("DIRICHLET_ALPHA", "0.3"))
    share = dirichlet_partition(everyones.labels.numpy(), context.clients, alpha)[context.client]
    data = Examples(everyones.inputs[share], everyones.labels[share])
    # Each client measures on its own part of the held-out data: the weighted mean is the accuracy on all of it.
    mine = slice(context.client, None, context.clients)
    measured = Examples(held_out.inputs[mine].clone(), held_out.labels[mine].clone())
    del everyones, held_out

    model = build()
    for rnd in isthmus.rounds(model, evaluate=lambda: evaluate(model, measured)):
        settings = DEFAULTS.updated(rnd.config)
        optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9))
        loss = train(model, data, optimizer, settings, seed=rnd.number * 1_000_003 + context.client)
        rnd.submit(num_examples=len(data), loss=loss)


if __name__ == "__main__":
    main()
