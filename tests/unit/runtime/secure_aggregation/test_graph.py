import hashlib
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.secure_aggregation.graph import degree, neighbours, neighbours_of, permutation
from isthmus_contracts.secure_sums import threshold

_clients = st.integers(0, 400)
_seeds = st.binary(min_size=32, max_size=32)


def _reached(graph: list[frozenset[int]], without: frozenset[int]) -> set[int]:
    start = next(client for client in range(len(graph)) if client not in without)
    reached, new = {start}, {start}
    while new:
        new = set().union(*(graph[client] for client in new)) - reached - without
        reached |= new
    return reached


@given(_clients, _seeds)
@settings(max_examples=60, deadline=None)
def test_the_graph_is_regular_symmetric_and_reproducible(clients: int, seed: bytes) -> None:
    graph = neighbours(clients, seed)
    assert len(graph) == clients
    assert all(len(near) == degree(clients) for near in graph)
    assert all(own not in near and own in graph[other] for own, near in enumerate(graph) for other in near)
    assert graph == neighbours(clients, seed)
    assert graph[:3] == [neighbours_of(own, clients, seed) for own in range(min(clients, 3))]


@given(st.integers(2, 200), _seeds, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_graph_stays_connected_without_any_fewer_than_degree_clients(clients, seed, random) -> None:
    graph = neighbours(clients, seed)
    lost = frozenset(random.sample(range(clients), degree(clients) - 1))
    assert len(_reached(graph, lost)) == clients - len(lost)
    # Removing all but two of a client's neighbours is the hardest case for a circle.
    near = frozenset(random.sample(sorted(graph[0]), max(0, degree(clients) - 2)))
    assert len(_reached(graph, near)) == clients - len(near)


@pytest.mark.parametrize(
    ("clients", "expected"),
    [(0, 0), (1, 0), (2, 1), (3, 2), (32, 31), (33, 32), (34, 32), (64, 32), (65, 34), (100, 34), (1000, 40)],
)
def test_degree(clients: int, expected: int) -> None:
    assert degree(clients) == expected


@pytest.mark.parametrize(
    ("holders", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (16, 11), (32, 22), (33, 23), (41, 28)]
)
def test_the_threshold_is_more_than_two_thirds(holders: int, expected: int) -> None:
    assert threshold(holders) == expected
    assert 3 * expected > 2 * holders >= 3 * (expected - 1)


def test_another_seed_gives_another_graph() -> None:
    assert neighbours(64, bytes(32)) != neighbours(64, b"\x01" * 32)


def test_all_permutations_are_equally_likely() -> None:
    drawn = Counter(tuple(permutation(4, number.to_bytes(4, "big"))) for number in range(24_000))
    assert set(drawn) == set(permutations(range(4)))
    # Chi-square with 23 degrees of freedom; the draws are fixed, so this never fails by chance.
    assert sum((count - 1000) ** 2 / 1000 for count in drawn.values()) < 49.7


def test_words_that_would_favour_small_numbers_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Output:
        def __init__(self, _data: bytes) -> None:
            pass

        def digest(self, length: int) -> bytes:
            # 2^32 - 1 is beyond the largest multiple of 3; the second word is not.
            return (b"\xff" * 4 + (7).to_bytes(4, "big")) * (length // 8)

    monkeypatch.setattr(hashlib, "shake_256", Output)
    # Below 3 the draw is 7 % 3 = 1, not (2^32 - 1) % 3 = 0. Below 2 both words are fair, and odd.
    assert permutation(3, b"") == [0, 2, 1]


def test_the_stream_of_words_goes_on_without_a_seam() -> None:
    assert sorted(permutation(5000, b"seed")) == list(range(5000))
