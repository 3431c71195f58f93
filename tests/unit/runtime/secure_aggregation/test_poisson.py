"""Poisson and Skellam variables: their distribution, and the parts that make it exact."""

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from isthmus.entropy import Entropy, keystream
from isthmus.secure_aggregation.encoding.poisson import _COLUMN_BITS, _COLUMNS, Poisson, skellam

MEANS = [1, 2, 37, 1023, 1024, 1700, 142_635, 10**9, 3 * 10**16]


def seeded(seed: int) -> Entropy:
    return random.Random(seed).randbytes  # noqa: S311 - a test wants to be repeated


@pytest.mark.parametrize("mean", [1, 2, 37, 1023, 1024, 1700, 142_635])
def test_it_is_poisson(mean: int) -> None:
    drawn = Poisson(mean).draw(300_000, seeded(mean)) + mean
    assert len(drawn) == 300_000
    # In cells of about equal probability, and the tails beside them.
    edges = np.unique(stats.poisson.ppf([1e-4, 1e-3, *np.linspace(0.01, 0.99, 99), 0.999, 0.9999], mean))
    cells = np.diff(np.concatenate(([0], stats.poisson.cdf(edges, mean), [1])))
    found = np.bincount(np.searchsorted(edges, drawn), minlength=len(cells))
    assert stats.chisquare(found, cells * len(drawn)).pvalue > 1e-3


@pytest.mark.parametrize("mean", [10**9, 6 * 10**14, 3 * 10**16])
def test_with_a_large_mean_it_is_almost_normal(mean: int) -> None:
    drawn = Poisson(mean).draw(300_000, seeded(1)) / math.sqrt(mean)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    beyond = np.abs(drawn) > 4
    assert stats.binomtest(int(beyond.sum()), len(drawn), 2 * stats.norm.sf(4)).pvalue > 1e-3


@pytest.mark.parametrize("mean", [3, 5000, 10**12])
def test_differences_have_twice_the_variance_and_no_mean(mean: int) -> None:
    drawn = skellam(mean, 400_000, seeded(2))
    assert drawn.dtype == np.int64
    assert float(drawn.var()) == pytest.approx(2 * mean, rel=0.01)
    assert abs(float(drawn.mean())) < 5 * math.sqrt(2 * mean / 400_000)
    assert stats.pearsonr(drawn[:-1], drawn[1:]).pvalue > 1e-3


@pytest.mark.parametrize("mean", MEANS)
def test_columns_have_exactly_the_weights(mean: int) -> None:
    sampler = Poisson(mean)
    mass = [0] * _COLUMNS
    for column, (limit, alias) in enumerate(zip(sampler._limits.tolist(), sampler._aliases.tolist(), strict=True)):
        mass[column] += limit
        mass[alias] += 2**_COLUMN_BITS - limit
    assert mass[: len(sampler._weights)] == sampler._weights
    # Little is drawn again for nothing.
    assert sum(sampler._weights) > 0.999 * 2 ** (_COLUMN_BITS + 11)


def exact_ratio(sampler: Poisson, value: int) -> Decimal:
    with localcontext() as context:
        context.prec, context.Emin = 80, -1_000_000
        return sampler._log_exactly(value).exp()


@pytest.mark.parametrize("mean", MEANS)
def test_no_strip_is_lower_than_its_probabilities_or_sure_of_too_much(mean: int) -> None:
    sampler, dice = Poisson(mean), random.Random(mean)  # noqa: S311
    width = 1 << sampler._shift
    for strip in dice.sample(range(len(sampler._weights)), 40):
        first, step = int(sampler._first[strip]), int(sampler._step[strip])
        last = first + step * (width - 1)
        if mean + last < 0:
            continue
        weight = Decimal(sampler._weights[strip])
        assert exact_ratio(sampler, first) * Decimal(sampler._scale) <= weight
        sure = Decimal(int(sampler._sure[strip])) / 2**sampler._spare_bits
        assert sure <= exact_ratio(sampler, last) * Decimal(sampler._scale) / weight


@pytest.mark.parametrize("mean", MEANS)
def test_doubles_are_as_exact_as_they_claim(mean: int) -> None:
    sampler, dice = Poisson(mean), random.Random(mean)  # noqa: S311
    deviation = math.sqrt(mean)
    values = [max(-mean, round(dice.uniform(-8, 8) * deviation)) for _ in range(60)]
    found = sampler._probability(np.array(values, dtype=np.int64))
    errors = sampler._error(np.array(values, dtype=np.int64))
    for value, ratio, error in zip(values, found.tolist(), errors.tolist(), strict=True):
        exact = exact_ratio(sampler, value)
        assert abs(Decimal(ratio) / exact - 1) <= Decimal(error)


@pytest.mark.parametrize("mean", [1, 40, 1023, 1024, 2000])
def test_decimals_are_the_ratio_of_factorials(mean: int) -> None:
    sampler = Poisson(mean)
    for value in (-min(mean, 150), -1, 0, 1, 60, 400):
        exact = Fraction(mean) ** value * Fraction(math.factorial(mean), math.factorial(mean + value))
        expected = Decimal(exact.numerator) / Decimal(exact.denominator)
        assert abs(exact_ratio(sampler, value) / expected - 1) < Decimal("1e-25")


def test_a_close_decision_takes_more_bits() -> None:
    """A random number that begins with the very bits of the probability is decided by the bits that follow."""
    sampler = Poisson(10**6)
    value = 1234
    strip = value >> sampler._shift
    with localcontext() as context:
        context.prec = 80
        ratio = exact_ratio(sampler, value) * Decimal(sampler._scale) / sampler._weights[strip]
        chance = int(ratio * 2**sampler._spare_bits)
        rest = int((ratio * 2**sampler._spare_bits - chance) * 2**64)
    below = np.ldexp(float(chance), -sampler._spare_bits)
    assert abs(below - float(ratio)) < 1e-9
    for bits, accepted in ((0, True), (rest - 1, True), (rest + 1, False), (2**64 - 1, False)):
        decided = sampler._decide(
            np.array([value]),
            np.array([strip]),
            np.array([chance], dtype=np.uint64),
            lambda count, bits=bits: bits.to_bytes(count, "little"),
        )
        assert decided.tolist() == [accepted]


def test_keystreams_differ_and_go_on() -> None:
    one, other = keystream(), keystream()
    drawn = [one(16), one(16), other(16), other(16)]
    assert len(set(drawn)) == 4 and all(len(part) == 16 for part in drawn)
    assert drawn[0] != bytes(16)
