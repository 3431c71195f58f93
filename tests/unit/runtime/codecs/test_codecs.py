"""Codecs have the properties that their papers claim: stochastic ones are unbiased, others keep their error bounds."""

import pytest
import torch

from isthmus.codecs.base import SEGMENT, SegmentCodec
from isthmus.codecs.plain import Plain
from isthmus.codecs.quantization.bfloat16 import BFloat16
from isthmus.codecs.quantization.float16 import Float16
from isthmus.codecs.quantization.int4 import Int4
from isthmus.codecs.quantization.int8 import Int8
from isthmus.codecs.rotation import Rotation
from isthmus.codecs.topk import TopK

STOCHASTIC = [Int8(), Int4(), Rotation(Int8()), Rotation(Int4())]
ALL = [Plain(), Float16(), BFloat16(), *STOCHASTIC, TopK(0.01, Plain()), TopK(0.1, Int8()), TopK(0.5, Float16())]


def name(codec: SegmentCodec) -> str:
    inner = getattr(codec, "_inner", None)
    return codec.name if inner is None else f"{codec.name}-{inner.name}"


def values(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Mixed magnitudes, as in real layers.
    return torch.randn(count, generator=generator) * torch.rand(count, generator=generator).exp()


def through(codec: SegmentCodec, given: torch.Tensor, seed: int = 1) -> torch.Tensor:
    data = codec.encode(given, seed)
    assert len(data) == codec.size(len(given))
    return codec.decode(memoryview(data), len(given), seed)


@pytest.mark.parametrize("codec", ALL, ids=name)
@pytest.mark.parametrize("count", [1, 2, 127, 256, 257, 1024, 5000, SEGMENT])
def test_every_length_comes_back_in_its_size(codec: SegmentCodec, count: int) -> None:
    given = values(count)
    result = through(codec, given)
    assert result.shape == given.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("codec", ALL, ids=name)
def test_the_seed_decides_everything(codec: SegmentCodec) -> None:
    given = values(3000)
    assert codec.encode(given, 7) == codec.encode(given.clone(), 7)
    if codec in STOCHASTIC:
        assert codec.encode(given, 7) != codec.encode(given, 8)


@pytest.mark.parametrize("codec", ALL, ids=name)
def test_bytes_per_value_hold_for_large_tensors(codec: SegmentCodec) -> None:
    assert codec.size(SEGMENT) / SEGMENT == pytest.approx(codec.bytes_per_value, rel=0.01)


@pytest.mark.parametrize("codec", STOCHASTIC, ids=name)
def test_the_quantisers_are_unbiased(codec: SegmentCodec) -> None:
    """Alistarh et al. 2017, lemma 3.1 (i): E[Q(x)] = x. The mean of n samples is within 6 standard errors."""
    given, samples = values(1024), 600
    drawn = torch.stack([through(codec, given, seed) for seed in range(samples)]).double()
    error = drawn.mean(0) - given.double()
    standard_error = drawn.std(0) / samples**0.5
    # A value so close to a level that no sample takes the other one shows no deviation: allow that part of a level.
    level = float(given.abs().max()) / (127 if "Int8" in name(codec) else 7)
    assert (error.abs() <= 6 * standard_error + 0.02 * level).all()
    # Over all values there is no common drift either.
    assert abs(float(error.sum())) <= 6 * float(standard_error.square().sum().sqrt())


@pytest.mark.parametrize(("codec", "block", "levels"), [(Int8(), 256, 127), (Int4(), 128, 7)], ids=["Int8", "Int4"])
def test_an_error_is_below_one_level_of_its_block(codec: SegmentCodec, block: int, levels: int) -> None:
    given = values(8 * block)
    errors = (through(codec, given) - given).view(-1, block)
    steps = given.view(-1, block).abs().amax(1) / levels
    assert (errors.abs().amax(1) <= steps * 1.001).all()
    # Rounding to one of two neighbours has a variance of at most a quarter of their distance, squared.
    assert (errors.square().mean(1) <= steps.square() / 4 * 1.2).all()


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=name)
def test_values_on_a_level_are_exact(codec: SegmentCodec) -> None:
    assert through(codec, torch.zeros(300)).tolist() == [0.0] * 300
    extremes = torch.tensor([-3.5, 3.5, 0.0, 3.5])
    torch.testing.assert_close(through(codec, extremes), extremes)


@pytest.mark.parametrize("codec", [Int8(), Int4(), Rotation(Int8())], ids=name)
def test_extreme_scales(codec: SegmentCodec) -> None:
    for scale in (1e-45, 1e-38, 1e30):
        result = through(codec, values(512) * scale)
        assert torch.isfinite(result).all()
    assert through(codec, torch.full((512,), 1e-44)).abs().max() <= 1e-37


@pytest.mark.parametrize("codec", [codec for codec in ALL if codec.name != "Rotation"], ids=name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(codec: SegmentCodec, bad: float) -> None:
    given = values(600)
    given[17] = bad
    data = codec.encode(given, 1)
    try:
        result = codec.decode(memoryview(data), 600, 1)
    except ValueError as error:
        assert "NaN or infinity" in str(error)
    else:
        assert not torch.isfinite(result).all()


def test_float16_is_within_half_a_unit_in_the_last_place() -> None:
    given = values(4000)
    large = given[given.abs() > 6.2e-5]
    assert ((through(Float16(), large) - large).abs() <= large.abs() * 2.0**-11).all()
    assert through(Float16(), torch.tensor([1e6, -1e6])).tolist() == [65504.0, -65504.0]


def test_bfloat16_is_within_half_a_unit_in_the_last_place() -> None:
    given = values(4000) * 1e20
    assert ((through(BFloat16(), given) - given).abs() <= given.abs() * 2.0**-8).all()


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5])
def test_topk_contracts_and_keeps_the_largest(fraction: float) -> None:
    """Stich et al. 2018, definition 2.1 and lemma A.1: ||x - TopK(x)||^2 <= (1 - k/d) ||x||^2."""
    codec, given = TopK(fraction, Plain()), values(5000)
    kept = codec.kept(5000)
    result = through(codec, given)
    assert (given - result).square().sum() <= (1 - kept / 5000) * given.square().sum()
    assert int((result != 0).sum()) == kept
    assert given[result != 0].abs().min() >= given[result == 0].abs().max()


def test_a_rotation_keeps_lengths_and_spreads_an_outlier() -> None:
    """Suresh et al. 2017: the range of a rotated vector is small, which reduces the error of spiky ones."""
    spiky = torch.zeros(4096)
    spiky[::1024] = 100.0
    spiky += values(4096)
    exact = through(Rotation(Plain()), spiky)
    torch.testing.assert_close(exact, spiky, rtol=1e-5, atol=1e-4)
    plain = (through(Int4(), spiky) - spiky).square().sum()
    rotated = (through(Rotation(Int4()), spiky) - spiky).square().sum()
    assert rotated < plain / 2
