"""The noise is normal, and uses all of the given entropy."""

import os
import random

import numpy as np
import pytest
from scipy import stats

from isthmus.privacy.noise import gaussian


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - a test wants to be repeated


def test_it_is_standard_normal() -> None:
    drawn = gaussian(400_001, seeded(7).randbytes)
    assert len(drawn) == 400_001
    assert stats.kstest(drawn, "norm").pvalue > 0.001
    # Also in the tails, where a sum of a few uniform numbers would fail.
    beyond = np.abs(drawn) > 4
    assert stats.binomtest(int(beyond.sum()), len(drawn), 2 * stats.norm.sf(4)).pvalue > 0.001


def test_the_numbers_do_not_depend_on_each_other() -> None:
    drawn = gaussian(200_000, seeded(3).randbytes)
    half = len(drawn) // 2
    for one, other in ((drawn[:half], drawn[half:]), (drawn[:-1], drawn[1:]), (drawn[:half] ** 2, drawn[half:] ** 2)):
        assert stats.pearsonr(one, other).pvalue > 0.001


@pytest.mark.parametrize("byte", [0, 255])
def test_no_entropy_makes_infinity(byte: int) -> None:
    drawn = gaussian(10, lambda size: bytes([byte]) * size)
    assert np.isfinite(drawn).all()
    assert np.abs(drawn).max() < 9.5


def test_the_systems_generator_is_asked_for_128_bits_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom

    def urandom(size: int) -> bytes:
        asked.append(size)
        return real(size)

    assert gaussian.__defaults__ == (os.urandom,)
    assert not np.array_equal(gaussian(5, urandom), gaussian(5, urandom))
    assert asked == [48, 48]
