"""Graph of the clients that share masks with each other.

Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS 2020): beyond a few dozen clients
O(log n) neighbours for each are enough if they are chosen at random.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

# Up to this number every client is every other's neighbour.
COMPLETE_UP_TO = 32
_DOMAIN = b"isthmus secure aggregation v1 graph"
_WORD_BYTES = 4
_WORDS = 1 << (8 * _WORD_BYTES)


def degree(clients: int) -> int:
    """Return each client's number of neighbours."""
    if clients <= COMPLETE_UP_TO:
        return max(0, clients - 1)
    return min(clients - 1, 2 * math.ceil(math.log2(clients)) + 20)


def largest_foreign(own: str, others: Iterable[str]) -> int:
    """Return how many of the others are of the party that has most of them, apart from the own party."""
    return max(Counter(party for party in others if party != own).values(), default=0)


def neighbours(clients: int, seed: bytes) -> list[frozenset[int]]:
    """Return the neighbours of each client, by number.

    Beyond ``COMPLETE_UP_TO`` clients this is the Harary graph of ``degree(clients)``, the smallest that stays connected
    without any ``degree - 1`` clients, over a permutation drawn from ``seed``.
    """
    places = _places(clients, seed)
    result: list[frozenset[int]] = [frozenset()] * clients
    for place, client in enumerate(places):
        result[client] = _near(places, place)
    return result


def neighbours_of(own: int, clients: int, seed: bytes) -> frozenset[int]:
    """Return one client's neighbours, as in :func:`neighbours`."""
    places = _places(clients, seed)
    return _near(places, places.index(own))


def _places(clients: int, seed: bytes) -> Sequence[int]:
    """Return the clients in the order of the circle."""
    return range(clients) if clients <= COMPLETE_UP_TO else permutation(clients, seed)


def _near(places: Sequence[int], place: int) -> frozenset[int]:
    if len(places) <= COMPLETE_UP_TO:
        return frozenset(places) - {places[place]}
    reach = degree(len(places)) // 2
    around = [*places[-reach:], *places, *places[:reach]]
    return frozenset(around[place : place + reach] + around[place + reach + 1 : place + 2 * reach + 1])


def permutation(length: int, seed: bytes) -> list[int]:
    """Return a uniform permutation of ``range(length)``: the shuffle of Fisher and Yates with words of SHAKE-256."""
    words = _words(seed)
    places = list(range(length))
    for last in range(length - 1, 0, -1):
        other = _below(last + 1, words)
        places[last], places[other] = places[other], places[last]
    return places


def _below(bound: int, words: Iterator[int]) -> int:
    """Return a uniform number below ``bound``: a remainder, without the words that would favour small ones."""
    fair = _WORDS - _WORDS % bound
    return next(word for word in words if word < fair) % bound


def _words(seed: bytes) -> Iterator[int]:
    """Yield SHAKE-256's output as an endless stream of big-endian words of 32 bits."""
    start, end = 0, 4096
    while True:
        # A longer output begins with the shorter one.
        output = hashlib.shake_256(_DOMAIN + seed).digest(end)
        for at in range(start, end, _WORD_BYTES):
            yield int.from_bytes(output[at : at + _WORD_BYTES], "big")
        start, end = end, 2 * end
