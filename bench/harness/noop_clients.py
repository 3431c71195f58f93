"""Clients that do no training: ``python -m bench.harness.noop_clients CLIENTS PROCESSES PARAMETERS``.

Two more arguments are ``SECONDS`` and ``SILENT``, by default 0. The clients wait for ``SECONDS`` before each update, as
if each trained on a machine of its own. The last ``SILENT`` of them stay connected and never hand in an update.
"""

import logging
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from isthmus.client.context import Context
from isthmus.client.loop.client_loop import ClientLoop
from isthmus.client.loop.ranks import Ranks

from .aggregator_process import POOL, connections_of_their_own
from .barrier import Barrier
from .processes import in_processes


class Weights:
    """A model of one tensor per 25 million parameters."""

    def __init__(self, parameters: int, device: str = "cpu") -> None:
        sizes = [25_000_000] * (parameters // 25_000_000)
        if rest := parameters % 25_000_000:
            sizes.append(rest)
        self.tensors = {f"w{number}": torch.zeros(size, device=device) for number, size in enumerate(sizes)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], /) -> None:
        for name, tensor in self.tensors.items():  # as modules do
            tensor.copy_(state_dict[name])


@dataclass(frozen=True)
class Plan:
    """Number of clients, parameters of the model, seconds before each update, and clients that never submit."""

    clients: int
    parameters: int
    seconds: float
    silent: int


def participate(index: int, plan: Plan, barrier: Barrier) -> None:
    context = Context(pool=POOL, index=index, pool_size=plan.clients, client=index, clients=plan.clients)
    part = ClientLoop(Weights(plan.parameters), None, None, context, Ranks(), threading.Event())
    for rnd in part.rounds():
        barrier.wait(index)
        if index >= plan.clients - plan.silent:
            threading.Event().wait()
        time.sleep(plan.seconds)
        rnd.submit(num_examples=1)


def main() -> None:
    logging.getLogger("isthmus").addHandler(logging.NullHandler())
    clients, processes, parameters, seconds, silent = (*sys.argv[1:], "0", "0")[:5]
    plan = Plan(int(clients), int(parameters), float(seconds), int(silent))
    torch.set_num_threads(1)
    connections_of_their_own()
    barrier = Barrier(int(processes))
    in_processes(plan.clients, int(processes), lambda index: participate(index, plan, barrier), barrier)


if __name__ == "__main__":
    main()
