"""Honest clients with a little training: ``python -m bench.soak.honest CLIENTS TLS``.

``TLS`` contains one directory of credentials per client.
"""

import logging
import os
import sys
import threading
from pathlib import Path

import torch

from isthmus.client.context import Context
from isthmus.client.loop.client_loop import ClientLoop
from isthmus.client.loop.ranks import Ranks
from isthmus_contracts import identities

from ..harness.aggregator_process import POOL
from ..harness.barrier import Barrier
from ..harness.processes import in_processes

STEPS = 30


def participate(index: int, clients: int, tls: Path, barrier: Barrier) -> None:
    """Train a small perceptron on the client's own linear data, and evaluate each model."""
    os.environ[identities.ENV_TLS_DIR] = str(tls / f"{POOL}-{index}")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 100), torch.nn.ReLU(), torch.nn.Linear(100, 1))
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(100 + 10 * index, 50, generator=generator)
    targets = inputs[:, :5].sum(1) + index / 10

    def loss() -> torch.Tensor:
        mean: torch.Tensor = (model(inputs).squeeze(1) - targets).square().mean()
        return mean

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            return {"accuracy": 1 / (1 + float(loss())) - 1, "num_examples": len(inputs)}

    context = Context(pool=POOL, index=index, pool_size=clients, client=index, clients=clients)
    part = ClientLoop(model, evaluate, None, context, Ranks(), threading.Event())
    for rnd in part.rounds():
        barrier.wait(index)
        optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(STEPS):
            optimizer.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        rnd.submit(num_examples=len(inputs), loss=float(value.detach()))


def main() -> None:
    """Run every client in its own process."""
    logging.getLogger("isthmus").addHandler(logging.NullHandler())
    clients, tls = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    barrier = Barrier(clients)
    in_processes(clients, clients, lambda index: participate(index, clients, tls, barrier), barrier)


if __name__ == "__main__":
    main()
