"""Shamir's secret sharing over the prime field of 2^521 - 1.

Shamir, "How to Share a Secret" (1979): a secret is the value at 0 of a random polynomial of degree ``threshold - 1``,
and a share is its value at another point. Any ``threshold`` shares determine the polynomial; fewer say nothing.
"""

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = (PRIME.bit_length() + 7) // 8
# Subsets of shares that are tried where errors are too many to decode: half a second for 60 shares.
_MOST_SUBSETS = 2000

Polynomial = list[int]  # coefficients, the lowest power first; the last is not zero


class ShamirError(ValueError):
    """A secret cannot be shared or recovered. ``str()`` gives the reason."""


def split(secret: bytes, threshold: int, xs: Sequence[int]) -> dict[int, bytes]:
    """Return a share of ``SHARE_BYTES`` bytes for each point of ``xs``; any ``threshold`` of them recover the secret.

    ``secret`` has ``SECRET_BYTES`` bytes. Raises ``ShamirError`` if the points are not distinct numbers above 0, or
    fewer than ``threshold``.
    """
    if len(secret) != SECRET_BYTES:
        raise ShamirError(f"a secret of {len(secret)} bytes cannot be shared: {SECRET_BYTES} are expected")
    values = split_number(int.from_bytes(secret, "big"), threshold, xs, PRIME)
    return {x: y.to_bytes(SHARE_BYTES, "big") for x, y in values.items()}


def combine(
    shares: Mapping[int, bytes], threshold: int, check: Callable[[bytes], bool]
) -> tuple[bytes, frozenset[int]]:
    """Recover a secret, and find the shares that do not belong to it.

    ``shares`` maps points to shares, ``check`` tells the right secret (by a commitment to it, for example). Wrong
    shares are found as long as at least ``(len(shares) + threshold) / 2`` are right; with fewer right ones, but at
    least ``threshold``, a bounded number of subsets is tried. Returns the secret and the points of the wrong shares.
    The points accuse their holders only if the secret's owner is honest, since an owner can give away shares that do
    not fit, and in the second case only if the wrong shares were not made to fit each other.

    Raises ``ShamirError`` if no secret passes ``check``.
    """
    points = {x: y for x, share in sorted(shares.items()) if (y := _number(x, share)) is not None}
    if threshold < 1 or len(points) < threshold:
        raise ShamirError(f"{len(points)} valid shares of {len(shares)}, {threshold} are needed")
    for xs in _candidates(points, threshold):
        value = value_at_zero({x: points[x] for x in xs[:threshold]}, PRIME)
        if value < 2 ** (8 * SECRET_BYTES) and check(secret := value.to_bytes(SECRET_BYTES, "big")):
            right: Collection[int] = xs
            if len(xs) < len(points):
                polynomial = interpolate({x: points[x] for x in xs[:threshold]}, PRIME)
                right = [x for x, y in points.items() if _evaluate(polynomial, x, PRIME) == y]
            return secret, frozenset(shares.keys() - right)
    raise ShamirError(f"{len(shares)} shares with a threshold of {threshold}: too many of them are wrong")


def split_number(secret: int, threshold: int, xs: Sequence[int], prime: int) -> dict[int, int]:
    """Return the values at ``xs`` of a random polynomial over the field of ``prime`` with the value ``secret`` at 0."""
    if not 1 <= threshold <= len(xs):
        raise ShamirError(f"a threshold of {threshold} does not fit {len(xs)} shares")
    if len(set(xs)) != len(xs) or not all(0 < x < prime for x in xs):
        raise ShamirError("the points of shares must be distinct numbers above 0")
    polynomial = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    return {x: _evaluate(polynomial, x, prime) for x in xs}


def fits(points: Mapping[int, int], threshold: int, prime: int) -> bool:
    """Return True if the points lie on one polynomial of degree below ``threshold``.

    Points that do not are found with a probability of 1 - 1 / prime, in a fraction of the time of :func:`decode`.
    """
    # Values of this polynomial are orthogonal to those of every polynomial of degree below n - threshold, if each is
    # divided by its point's distances from the others (the dual of a Reed-Solomon code).
    if len(points) <= threshold:
        return True
    random = [secrets.randbelow(prime) for _ in range(len(points) - threshold)]
    weights = _weights(list(points), prime)
    total = sum(
        y * weight % prime * _evaluate(random, x, prime) for (x, y), weight in zip(points.items(), weights, strict=True)
    )
    return not total % prime


def value_at_zero(points: Mapping[int, int], prime: int) -> int:
    """Return the value at 0 of the polynomial of degree below ``len(points)`` through all points (Lagrange)."""
    xs = list(points)
    # The product of all others' points, divided by their distances: x and its own factor cancel in the last step.
    product = math.prod(-x for x in xs)
    inverses = _inverses([-x % prime for x in xs], prime)
    weights = _weights(xs, prime)
    terms = zip(points.values(), weights, inverses, strict=True)
    return product * sum(y * weight % prime * inverse for y, weight, inverse in terms) % prime


def _weights(xs: Sequence[int], prime: int) -> list[int]:
    """Return for each point 1 / product of its distances from the others."""
    return _inverses([math.prod(x - other for other in xs if other != x) % prime for x in xs], prime)


def _inverses(values: Sequence[int], prime: int) -> list[int]:
    """Return the inverses of numbers other than 0, with one inversion (Montgomery's trick)."""
    before = [1]
    for value in values:
        before.append(before[-1] * value % prime)
    inverse = pow(before[-1], -1, prime)
    result = []
    for value, product in zip(reversed(values), reversed(before[:-1]), strict=True):
        result.append(inverse * product % prime)
        inverse = inverse * value % prime
    return result[::-1]


def interpolate(points: Mapping[int, int], prime: int) -> Polynomial:
    """Return the polynomial of degree below ``len(points)`` through all points (Lagrange)."""
    product = _roots(points, prime)
    result = [0] * len(points)
    for x, y in points.items():
        basis = _without_root(product, x, prime)
        factor = y * pow(_evaluate(basis, x, prime), -1, prime)
        for power, coefficient in enumerate(basis):
            result[power] = (result[power] + factor * coefficient) % prime
    return _trimmed(result)


def decode(points: Mapping[int, int], threshold: int, prime: int) -> Polynomial | None:
    """Return the polynomial of degree below ``threshold`` through all but at most (n - threshold) / 2 of n points.

    Gao, "A New Algorithm for Decoding Reed-Solomon Codes" (2003). Returns None if there is none.
    """
    # The extended Euclidean algorithm, stopped halfway: a remainder, and the factor of the interpolated polynomial.
    before, now = _roots(points, prime), interpolate(points, prime)
    factor_before: Polynomial = []
    factor: Polynomial = [1]
    while 2 * (len(now) - 1) >= len(points) + threshold:
        quotient, remainder = _divide(before, now, prime)
        before, now = now, remainder
        factor_before, factor = factor, _minus(factor_before, _times(quotient, factor, prime), prime)
    quotient, remainder = _divide(now, factor, prime)
    return quotient if not remainder and len(quotient) <= threshold else None


def _candidates(points: Mapping[int, int], threshold: int) -> Iterator[Sequence[int]]:
    """Yield sets of points that lie on one polynomial each, the largest first."""
    if fits(points, threshold, PRIME):
        yield list(points)
    elif (polynomial := decode(points, threshold, PRIME)) is not None:
        yield [x for x, y in points.items() if _evaluate(polynomial, x, PRIME) == y]
    yield from _subsets(list(points), threshold)


def _subsets(xs: list[int], size: int) -> Iterable[Sequence[int]]:
    """Return all subsets, or a random choice of them if they are many, which no sender of wrong shares can foresee."""
    if math.comb(len(xs), size) <= _MOST_SUBSETS:
        return combinations(xs, size)
    random = secrets.SystemRandom()
    return (random.sample(xs, size) for _ in range(_MOST_SUBSETS))


def _number(x: int, share: bytes) -> int | None:
    y = int.from_bytes(share, "big")
    return y if 0 < x < PRIME and len(share) == SHARE_BYTES and y < PRIME else None


def _evaluate(polynomial: Polynomial, x: int, prime: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % prime
    return value


def _roots(xs: Iterable[int], prime: int) -> Polynomial:
    """Return the product of (X - x) over all points."""
    product = [1]
    for x in xs:
        product = [(low - x * high) % prime for low, high in zip([0, *product], [*product, 0], strict=True)]
    return product


def _without_root(product: Polynomial, x: int, prime: int) -> Polynomial:
    """Return the product divided by (X - x) (Horner)."""
    quotient = [0] * (len(product) - 1)
    carry = 0
    for power in range(len(quotient) - 1, -1, -1):
        carry = quotient[power] = (product[power + 1] + carry * x) % prime
    return quotient


def _divide(dividend: Polynomial, divisor: Polynomial, prime: int) -> tuple[Polynomial, Polynomial]:
    """Return quotient and remainder; ``divisor`` is not zero."""
    rest = list(dividend)
    quotient = [0] * max(0, len(dividend) - len(divisor) + 1)
    inverse = pow(divisor[-1], -1, prime)
    for shift in range(len(quotient) - 1, -1, -1):
        factor = quotient[shift] = rest[shift + len(divisor) - 1] * inverse % prime
        for power, coefficient in enumerate(divisor):
            rest[shift + power] = (rest[shift + power] - factor * coefficient) % prime
    return quotient, _trimmed(rest)


def _times(first: Polynomial, second: Polynomial, prime: int) -> Polynomial:
    result = [0] * (len(first) + len(second))
    for power, coefficient in enumerate(first):
        for other, factor in enumerate(second):
            result[power + other] = (result[power + other] + coefficient * factor) % prime
    return _trimmed(result)


def _minus(first: Polynomial, second: Polynomial, prime: int) -> Polynomial:
    length = max(len(first), len(second))
    padded = (polynomial + [0] * (length - len(polynomial)) for polynomial in (first, second))
    return _trimmed([(a - b) % prime for a, b in zip(*padded, strict=True)])


def _trimmed(polynomial: Polynomial) -> Polynomial:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial
