"""Central training of the digits model on all data: the upper bound for a federated run.

``python -m isthmus_examples.central`` trains for as many epochs as a client of examples/digits.yaml does in all.
"""

import argparse
import time

import torch

from isthmus_examples.digits import DEFAULTS, build, load
from isthmus_examples.training import Settings, evaluate, train

ROUNDS = 20


def main() -> None:
    """Train and print the accuracy on the held-out data."""
    parser = argparse.ArgumentParser(description="Trains the digits model in one place.")
    parser.add_argument("--epochs", type=int, default=ROUNDS * DEFAULTS.epochs)
    parser.add_argument("--learning-rate", type=float, default=DEFAULTS.learning_rate)
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, held_out = load()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.learning_rate)
    settings = Settings(arguments.epochs, arguments.learning_rate, arguments.batch_size)
    start = time.monotonic()
    train(model, data, optimizer, settings, seed=0)
    accuracy = evaluate(model, held_out)["accuracy"]
    print(f"central: accuracy {accuracy:.4f} after {settings.epochs} epochs in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
