"""Exact Poisson and Skellam variables from a cryptographic generator.

Agarwal, Kairouz and Liu (2021) prove their guarantee for the exact distribution. Samplers for simulations, such as
numpy's, round real numbers and use generators whose state can be recovered from a few outputs.
"""

import math
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ...entropy import Entropy

Integers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
_Doubles = npt.NDArray[np.float64]

# Means from which Stirling's series is used. All values within the strips are then above 190, where it converges fast.
_LARGE = 1024
# Alias columns: strips at both sides of the mean, and one outcome that is drawn again.
_COLUMNS, _STRIPS = 2048, 1023
_COLUMN_BITS = 53
# Standard deviations that the strips cover. Beyond them is less than 1e-100 of the distribution.
_REACH = 24
# Relative error of a double operation, with a margin for the few that are combined here.
_ULPS = 2.0**-49
_BLOCK = 1 << 16


class Poisson:
    """Sampler of Poisson variables with an integer mean, by rejection from strips of equal width.

    A strip is drawn by Walker's alias method (1977) with integer weights, and a value in it by random bits: both are
    exact. The value is accepted with the ratio of its probability and the strip's weight. Doubles decide this wherever
    their error allows; otherwise decimals of 80 digits and further random bits do. So no rounding enters the
    distribution.
    """

    def __init__(self, mean: int) -> None:
        """``mean``: at least 1 and below 2^60."""
        self._mean = mean
        reach = _REACH * math.sqrt(mean) + 64
        self._shift = 0 if mean < _LARGE else max(0, math.ceil(math.log2(reach / _STRIPS)))
        width = 1 << self._shift
        strips = _STRIPS if mean < _LARGE else math.ceil(reach / width)
        left = min(strips, mean) if mean < _LARGE else strips
        # Each side begins at the mean, where the probability is largest, so a strip's first value has its largest.
        first = np.concatenate((np.arange(strips) * width, -1 - np.arange(left) * width)).astype(np.int64)
        last = first + np.where(first < 0, 1 - width, width - 1)
        high, low = (self._probability(values) for values in (first, last))
        high, low = high * (1 + self._error(first)), low * (1 - self._error(last))
        self._scale = float(2 ** (_COLUMN_BITS + 11) * (1 - 2.0**-20) / high.sum())
        self._weights = [max(1, math.ceil(weight)) for weight in (high * self._scale * (1 + _ULPS)).tolist()]
        self._first = np.append(first, 0)
        self._step = np.where(self._first < 0, -1, 1)
        self._spare_bits = 64 - self._shift
        weights = np.array([*self._weights, 1], dtype=np.float64)
        at_least = np.append(low * self._scale, 0.0) / weights * (1 - _ULPS)
        # A value is accepted at once if its random number is below the smallest ratio in the strip.
        self._sure = np.array(
            [max(0, math.floor(math.ldexp(ratio, self._spare_bits)) - 1) for ratio in at_least], dtype=np.uint64
        )
        self._per_weight = np.append(self._scale / weights[:-1], 0.0)
        self._limits, self._aliases = _alias(self._weights)

    def draw(self, count: int, entropy: Entropy) -> Integers:
        """Return ``count`` independent variables, minus the mean."""
        parts, missing = [], count
        while missing:
            part = self._candidates(min(_BLOCK, missing + missing // 32 + 16), entropy)[:missing]
            parts.append(part)
            missing -= len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _candidates(self, count: int, entropy: Entropy) -> Integers:
        words = np.frombuffer(entropy(16 * count), dtype="<u8")
        choice, rest = words[:count], words[count:]
        column = (choice >> np.uint64(_COLUMN_BITS)).astype(np.int64)
        inside = (choice & np.uint64(2**_COLUMN_BITS - 1)) < self._limits[column]
        strip = np.where(inside, column, self._aliases[column])
        offset = (rest & np.uint64((1 << self._shift) - 1)).astype(np.int64)
        value = self._first[strip] + self._step[strip] * offset
        chance = rest >> np.uint64(self._shift)
        accepted = chance < self._sure[strip]
        unsure = np.flatnonzero(~accepted & (strip < len(self._weights)))
        accepted[unsure] = self._decide(value[unsure], strip[unsure], chance[unsure], entropy)
        return value[accepted]

    def _decide(self, value: Integers, strip: Integers, chance: _Words, entropy: Entropy) -> npt.NDArray[np.bool_]:
        ratio = self._probability(value) * self._per_weight[strip]
        error = self._error(value) + 4 * _ULPS
        below = np.ldexp(chance.astype(np.float64), -self._spare_bits)
        step = math.ldexp(1.0, -self._spare_bits)
        accepted: npt.NDArray[np.bool_] = below + step < ratio * (1 - error) - 2.0**-1000
        for each in np.flatnonzero(~accepted & (below < ratio * (1 + error) + 2.0**-1000)):
            accepted[each] = self._exactly(int(value[each]), int(strip[each]), int(chance[each]), entropy)
        return accepted

    def _exactly(self, value: int, strip: int, chance: int, entropy: Entropy) -> bool:
        """Decide one value with as many random bits as it needs."""
        bits = self._spare_bits
        with localcontext() as context:
            context.prec, context.Emin = 80, -1_000_000
            ratio = self._log_exactly(value).exp() * Decimal(self._scale) / self._weights[strip]
            for _ in range(8):
                if (Decimal(chance) + 1) / 2**bits <= ratio * (1 - Decimal("1e-45")):
                    return True
                if Decimal(chance) / 2**bits >= ratio * (1 + Decimal("1e-45")):
                    return False
                chance, bits = chance << 64 | int.from_bytes(entropy(8), "little"), bits + 64
        raise ArithmeticError("a random number equals a probability in all of its bits")

    def _probability(self, value: Integers) -> _Doubles:
        """Return the probability of ``mean + value``, over that of the mean."""
        result: _Doubles = np.exp(self._log(value))
        return result

    def _log(self, value: Integers) -> _Doubles:
        mean = float(self._mean)
        if self._mean < _LARGE:
            factorials = _log_factorials()
            small: _Doubles = value * math.log(mean) - factorials[value + self._mean] + factorials[self._mean]
            return small
        moved = value.astype(np.float64)
        large: _Doubles = (
            moved - (mean + moved + 0.5) * np.log1p(moved / mean) - _tail(mean + moved) + _tail(np.array(mean))
        )
        return large

    def _error(self, value: Integers) -> _Doubles:
        """Return a bound of the relative error of :meth:`_probability`."""
        terms = np.abs(value).astype(np.float64)
        if self._mean < _LARGE:
            terms = terms * 8 + 2e5  # sums of logarithms up to those of 2047!
        error: _Doubles = np.expm1((terms + 64) * _ULPS)
        return error

    def _log_exactly(self, value: int) -> Decimal:
        """Return the logarithm of :meth:`_probability`, to more than 45 digits, in a context of 80."""
        mean, result = Decimal(self._mean), Decimal(self._mean + value)
        if self._mean < _LARGE:
            factorial = Decimal(math.factorial(self._mean)) / Decimal(math.factorial(self._mean + value))
            return value * mean.ln() + factorial.ln()
        return value - (result + Decimal("0.5")) * (result / mean).ln() + _exact_tail(mean) - _exact_tail(result)


def skellam(mean: int, count: int, entropy: Entropy) -> Integers:
    """Return ``count`` differences of two Poisson variables with this mean. Their variance is twice the mean."""
    sampler = _sampler(mean)
    return sampler.draw(count, entropy) - sampler.draw(count, entropy)


@lru_cache(maxsize=8)
def _sampler(mean: int) -> Poisson:
    return Poisson(mean)


def _alias(weights: list[int]) -> tuple[_Words, Integers]:
    """Return the limits and aliases of Walker's method; what the weights leave of the columns is another outcome."""
    full = 1 << _COLUMN_BITS
    left = [*weights, _COLUMNS * full - sum(weights)]
    left += [0] * (_COLUMNS - len(left))
    limits, aliases = [full] * _COLUMNS, list(range(_COLUMNS))
    small = [column for column, weight in enumerate(left) if weight < full]
    large = [column for column, weight in enumerate(left) if weight > full]
    while small:
        column, giver = small.pop(), large[-1]
        limits[column], aliases[column] = left[column], giver
        left[giver] -= full - left[column]
        if left[giver] <= full:
            large.pop()
        if left[giver] < full:
            small.append(giver)
    return np.array(limits, dtype=np.uint64), np.array(aliases, dtype=np.int64)


def _tail(value: _Doubles) -> _Doubles:
    """Return log(value!) minus Stirling's formula, for values above 190."""
    return 1 / (12 * value) - 1 / (360 * value * value * value)


def _exact_tail(value: Decimal) -> Decimal:
    """Return log(value!) minus Stirling's formula, with an error below the first omitted term."""
    total = Decimal(0)
    for order, (above, below) in enumerate(_BERNOULLI, 1):
        total += Decimal(above) / (below * 2 * order * (2 * order - 1) * value ** (2 * order - 1))
    return total


# Numbers of Bernoulli with even indices, from 2. The next term is below 1e-45 for values above 190.
_BERNOULLI = (
    (1, 6), (-1, 30), (1, 42), (-1, 30), (5, 66), (-691, 2730), (7, 6), (-3617, 510), (43867, 798), (-174611, 330),
)  # fmt: skip


@lru_cache(maxsize=1)
def _log_factorials() -> _Doubles:
    return np.array([math.lgamma(number + 1) for number in range(2 * _LARGE)])
