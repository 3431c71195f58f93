"""The Dirichlet partition: each example is assigned once, and a smaller alpha makes clients differ more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus_examples.partition import dirichlet_partition

LABELS = np.repeat(np.arange(10), 100)


@given(
    clients=st.integers(1, 40),
    alpha=st.floats(0.001, 1000.0),
    seed=st.integers(0, 2**32 - 1),
    labels=st.lists(st.integers(0, 9), min_size=40, max_size=400).map(np.array),
)
def test_every_example_goes_to_exactly_one_client_and_no_client_goes_empty(
    clients: int, alpha: float, seed: int, labels: np.ndarray
) -> None:
    shares = dirichlet_partition(labels, clients, alpha, seed=seed)
    assert len(shares) == clients
    assert sorted(np.concatenate(shares)) == list(range(len(labels)))
    assert min(len(share) for share in shares) >= min(8, len(labels) // clients)


def test_every_client_computes_the_same_split() -> None:
    first, second = (dirichlet_partition(LABELS, 8, 0.3, seed=5) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_another_seed_makes_another_split() -> None:
    first, second = (dirichlet_partition(LABELS, 8, 0.3, seed=seed) for seed in (0, 1))
    assert not all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_smaller_alpha_makes_more_different_clients() -> None:
    def largest_class(alpha: float) -> float:
        shares = [share for seed in range(5) for share in dirichlet_partition(LABELS, 8, alpha, seed=seed)]
        return float(np.mean([np.bincount(LABELS[share]).max() / len(share) for share in shares]))

    assert largest_class(0.05) > largest_class(0.5) > largest_class(100.0)
    assert largest_class(100.0) < 0.2


@pytest.mark.parametrize("alpha", [1e33, 1e305, 1e308, float("inf")])
def test_an_infinite_alpha_makes_equal_shares(alpha: float) -> None:
    for share in dirichlet_partition(LABELS, 8, alpha):
        assert set(np.bincount(LABELS[share])) <= {12, 13}


@pytest.mark.parametrize(("clients", "alpha"), [(0, 0.3), (4, 0.0), (4, -1.0), (4, float("nan")), (1001, 0.3)])
def test_impossible_splits_are_refused(clients: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha|too few"):
        dirichlet_partition(LABELS, clients, alpha)
