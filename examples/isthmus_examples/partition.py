"""Split of a labelled data set into clients with different label distributions, as at real sites."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Above this, shares drawn from Dirichlet are equal within the precision of doubles.
_IID = 1e32

Indices = npt.NDArray[np.int64]


def dirichlet_partition(
    labels: npt.NDArray[np.integer], clients: int, alpha: float, *, seed: int = 0, at_least: int = 8
) -> list[Indices]:
    """Assign every example to exactly one client, each class by proportions drawn from Dirichlet(``alpha``).

    The smaller ``alpha``, the fewer classes a client sees: at 0.1 mostly one or two, at 100 nearly all alike; with
    ``math.inf`` the shares are equal (IID). Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification" (2019), brought Dirichlet splits to federated learning; dealing
    class by class, so that the clients' sizes differ too, is the variant of Yurochkin et al., "Bayesian Nonparametric
    Federated Learning of Neural Networks" (2019).

    The result depends on the arguments alone, so that every client computes the same split and takes its own share.
    Clients that came out with fewer than ``at_least`` examples get some from the largest ones.

    Raises ``ValueError`` where there are too few examples, or ``alpha`` is not positive.
    """
    if clients < 1 or not alpha > 0:
        raise ValueError(f"a partition needs at least one client and a positive alpha, not {clients} and {alpha}")
    at_least = min(at_least, len(labels) // clients)
    if at_least < 1:
        raise ValueError(f"{len(labels)} examples are too few for {clients} clients")
    random = np.random.default_rng(seed)
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        proportions = random.dirichlet(np.full(clients, alpha)) if alpha < _IID else np.full(clients, 1 / clients)
        cuts = np.rint(np.cumsum(proportions[:-1]) * len(members)).astype(np.int64)
        for share, part in zip(shares, np.split(members, cuts), strict=True):
            share.append(part)
    return _levelled([random.permutation(np.concatenate(share)) for share in shares], at_least)


def _levelled(shares: Sequence[Indices], at_least: int) -> list[Indices]:
    """Fill up shares below ``at_least`` from the largest ones; needs ``at_least * len(shares)`` examples."""
    result = list(shares)
    for client in range(len(result)):
        while (missing := at_least - len(result[client])) > 0:
            largest = max(range(len(result)), key=lambda number: len(result[number]))
            moved = min(missing, len(result[largest]) - at_least)
            result[client] = np.concatenate([result[client], result[largest][:moved]])
            result[largest] = result[largest][moved:]
    return result
