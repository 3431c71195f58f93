"""The clipping norm that follows the updates: the paper's formulas, and what is released of the clients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.privacy import Adaptation, Private
from isthmus.privacy.noise import Normals
from isthmus.strategies import Update, make_strategy
from isthmus_contracts.api.privacy import DifferentialPrivacy
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_contracts.dp_accounting import Spent


def silent(count: int) -> Normals:
    return np.zeros(count)


def private(norm: float, expected: int, noise: float = 1.0, **settings: float) -> Private:
    adaptation = Adaptation(**{"quantile": 0.5, "rate": 0.2, "count_noise": 2.0, **settings}, expected=expected)
    return Private(make_strategy(Spec()), norm, noise, expected, silent, adaptation)


def play(mechanism: Private, lengths: list[float]) -> None:
    base = {"w": torch.zeros(4)}
    mechanism.begin(base)
    for number, length in enumerate(lengths):
        mechanism.accept(Update(f"pool/{number}", 1, {"w": torch.tensor([length, 0.0, 0.0, 0.0])}))
    mechanism.finish()


@pytest.mark.parametrize(
    ("quantile", "length", "factor"),
    [(0.0, 1e-6, 0.5), (1.0, 1e6, 2.0), (1.0, 1e-6, 1.0), (0.0, 1e6, 1.0)],
)
def test_a_rate_of_log_two_halves_and_doubles(quantile: float, length: float, factor: float) -> None:
    """All updates on one side of the norm, and the quantile at an end: the geometric update of algorithm 1."""
    mechanism, norm = private(16.0, 5, quantile=quantile, rate=math.log(2)), 16.0
    for _ in range(4):
        play(mechanism, [length] * 5)
        norm *= factor
        assert mechanism.next_clip_norm == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.8])
def test_it_finds_the_quantile(quantile: float) -> None:
    lengths = [1.0 + number / 10 for number in range(100)]
    mechanism = private(100.0, len(lengths), quantile=quantile)
    for _ in range(200):
        play(mechanism, lengths)
    assert mechanism.next_clip_norm == pytest.approx(float(np.quantile(lengths, quantile)), abs=0.2)
    assert mechanism.clipped_ratio == pytest.approx(1 - quantile, abs=0.02)


def test_a_norm_holds_for_one_round() -> None:
    mechanism = private(1.0, 2)
    play(mechanism, [5.0, 5.0])
    assert (mechanism.clip_norm, mechanism.next_clip_norm) == (1.0, pytest.approx(math.exp(0.1)))
    mechanism.begin({"w": torch.zeros(4)})
    assert mechanism.clip_norm == pytest.approx(math.exp(0.1))
    mechanism.accept(Update("pool/0", 1, {"w": torch.tensor([5.0, 0.0, 0.0, 0.0])}))
    moved = float(mechanism.finish()["w"][0])
    assert moved == pytest.approx(math.exp(0.1) / 2, rel=1e-6)


@given(st.floats(0.1, 100), st.floats(0.51, 100))
def test_sum_and_count_together_cost_what_the_manifest_says(noise: float, factor: float) -> None:
    """Both are Gaussian: their mu add up in squares. A client moves the sum by the norm and the count by one half."""
    adaptation = Adaptation(0.5, 0.2, noise * factor, 10)
    both = Spent().after(adaptation.sum_multiplier(noise)).after(adaptation.count_noise / 0.5)
    assert both.mu_squared == pytest.approx(Spent().after(noise).mu_squared, rel=1e-9)
    assert adaptation.sum_multiplier(noise) > noise


def test_the_papers_default_costs_little() -> None:
    """Section 3.1: with 100 clients and a twentieth as the noise of the count, a multiplier of 1 grows by 0.5 %."""
    spec = DifferentialPrivacy.model_validate({"clipNorm": "1", "noiseMultiplier": "1", "adaptiveClipping": {}})
    adaptation = Adaptation.of(spec, 100)
    assert adaptation == Adaptation(0.5, 0.2, 5.0, 100)
    assert adaptation is not None and adaptation.sum_multiplier(1.0) == pytest.approx(1.005038)
    few = Adaptation.of(spec, 4)
    assert few is not None and few.count_noise == 1.0
    assert Adaptation.of(spec.model_copy(update={"adaptive_clipping": None}), 100) is None


def test_the_noise_has_the_larger_size_of_the_split() -> None:
    drawn: list[int] = []

    def ones(count: int) -> Normals:
        drawn.append(count)
        return np.ones(count)

    adaptation = Adaptation(0.5, 0.2, 1.0, 2)
    mechanism = Private(make_strategy(Spec()), 1.0, 1.0, 2, ones, adaptation)
    mechanism.begin({"w": torch.zeros(4)})
    mechanism.accept(Update("pool/0", 1, {"w": torch.zeros(4)}))
    released = mechanism.finish()
    assert drawn == [1, 4]
    assert released["w"].tolist() == pytest.approx([(1 - 1 / 4) ** -0.5 / 2] * 4)
    # One update within the norm, one missing: 1 - 1/2 of the two, and noise of one client.
    assert mechanism.clipped_ratio == pytest.approx(max(0.0, 1 - (0.5 + (0.5 + 1) / 2)))
    assert mechanism.next_clip_norm == pytest.approx(math.exp(-0.2 * (1.0 - 0.5)))


@pytest.mark.parametrize("normal", [1e9, -1e9])
def test_extreme_noise_moves_the_norm_by_its_rate_at_most(normal: float) -> None:
    adaptation = Adaptation(0.5, 0.2, 3.0, 2)
    mechanism = Private(make_strategy(Spec()), 1.0, 1.0, 2, lambda count: np.full(count, normal), adaptation)
    mechanism.begin({})
    mechanism.finish()
    assert abs(math.log(mechanism.next_clip_norm)) == pytest.approx(0.1)
