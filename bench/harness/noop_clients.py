"""Clients that do no training: ``python -m bench.harness.noop_clients CLIENTS PROCESSES PARAMETERS``."""

import logging
import sys
import threading
from collections.abc import Mapping

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


def participate(index: int, clients: int, parameters: int, barrier: Barrier) -> None:
    context = Context(pool=POOL, index=index, pool_size=clients, client=index, clients=clients)
    part = ClientLoop(Weights(parameters), None, None, context, Ranks(), threading.Event())
    for rnd in part.rounds():
        barrier.wait(index)
        rnd.submit(num_examples=1)


def main() -> None:
    logging.getLogger("isthmus").addHandler(logging.NullHandler())
    clients, processes, parameters = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    connections_of_their_own()
    barrier = Barrier(processes)
    in_processes(clients, processes, lambda index: participate(index, clients, parameters, barrier), barrier)


if __name__ == "__main__":
    main()
