"""Hostile clients that make every attack in a loop: ``python -m bench.soak.hostile PORT TLS POOL-INDEX...``.

They end when the standard input ends. Each writes its number of attacks by name to ``TLS/../POOL-INDEX.json``.
"""

import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import torch

from ..harness.aggregator_process import connections_of_their_own
from ..harness.barrier import Barrier
from ..harness.processes import in_processes
from .attacks import MESSAGES, Attack
from .floods import FLOODS, Flood
from .peer import Peer, Tally


def attack(port: int, tls: Path, name: str) -> None:
    """Make all attacks in random order, repeatedly, until the process ends."""
    os.nice(19 - os.nice(0))  # a real attacker is on another machine and takes no processor time from the others
    pool, _, index = name.rpartition("-")
    order, tally = random.Random(name), Tally(tls.parent / f"{name}.json")  # noqa: S311 - not for secrecy
    while True:
        floods: list[tuple[str, Callable[[], int]]] = [
            (each.__name__, _flood(each, port, tls / name)) for each in FLOODS
        ]
        attacks = [(each.__name__, _message(each, port, tls / name, pool, int(index))) for each in MESSAGES]
        both = [*floods, *attacks]
        order.shuffle(both)
        for title, made in both:
            taken = 0
            with suppress(grpc.RpcError, OSError):
                taken = made()
            tally.count(title, taken)
        tally.count_pass()


def _flood(flood: Flood, port: int, tls: Path) -> Callable[[], int]:
    def make() -> int:
        flood(port, tls)
        return 0

    return make


def _message(attack: Attack, port: int, tls: Path, pool: str, index: int) -> Callable[[], int]:
    def make() -> int:
        with Peer(port, tls, pool, index) as peer:
            return attack(peer)

    return make


def main() -> None:
    """Run every client in its own process."""
    port, tls, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    connections_of_their_own()
    barrier = Barrier(len(names))
    in_processes(len(names), len(names), lambda number: attack(port, tls, names[number]), barrier)


if __name__ == "__main__":
    main()
