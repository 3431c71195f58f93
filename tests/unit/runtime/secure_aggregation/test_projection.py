"""Rotations and choices of coordinates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.secure_aggregation.encoding.projection import Projection, every_of

SIZES = st.one_of(st.integers(0, 5000), st.integers(60_000, 140_000))


def forward(projection: Projection, values: torch.Tensor) -> torch.Tensor:
    pieces = [projection.forward(part, values[part.values].clone()) for part in projection.parts()]
    return torch.cat(pieces) if pieces else values.clone()


def backward(projection: Projection, coordinates: torch.Tensor) -> torch.Tensor:
    pieces = [projection.backward(part, coordinates[part.coordinates].clone()) for part in projection.parts()]
    return torch.cat(pieces) if pieces else coordinates.clone()


@given(SIZES, st.booleans(), st.integers(1, 9), st.binary(max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_the_parts_cover_every_value_and_coordinate_once(
    count: int, rotate: bool, every: int, seed: bytes, dtype: torch.dtype
) -> None:
    projection = Projection(count, rotate=rotate, every=every, seed=seed)
    parts = list(projection.parts())
    assert sum(part.values.stop - part.values.start for part in parts) == count
    assert sum(part.coordinates.stop - part.coordinates.start for part in parts) == projection.coordinates
    values = torch.randn(count, dtype=dtype)
    coordinates = forward(projection, values)
    assert (len(coordinates), coordinates.dtype) == (projection.coordinates, dtype)
    restored = backward(projection, coordinates)
    assert (len(restored), restored.dtype) == (count, dtype)
    if projection.is_identity:
        assert torch.equal(restored, values)
    elif every == 1:
        torch.testing.assert_close(restored, values, atol=1e-5, rtol=0)


@given(st.integers(1024, 200_000), st.integers(2, 9))
def test_one_coordinate_of_each_group_is_kept(count: int, every: int) -> None:
    projection = Projection(count, every=every, seed=b"round 1")
    values = torch.arange(1, count + 1, dtype=torch.float64)
    restored = backward(projection, forward(projection, values))
    kept = restored != 0
    assert torch.equal(restored[kept], values[kept])
    groups = torch.nn.functional.pad(kept, (0, -count % every)).view(-1, every)
    assert bool((groups.sum(1) == 1).all())


def test_each_place_of_a_group_is_kept_equally_often() -> None:
    count, every = 400_000, 4
    places = forward(Projection(count, every=every, seed=b"s"), torch.arange(count, dtype=torch.float64) % every)
    shares = torch.bincount(places.long(), minlength=every) / len(places)
    assert float((shares - 1 / every).abs().max()) < 6 * 0.5 / math.sqrt(len(places))


def test_the_seed_decides() -> None:
    values = torch.randn(3000)
    for settings in ({"rotate": True}, {"every": 3}):
        one, other, same = (forward(Projection(3000, seed=seed, **settings), values) for seed in (b"a", b"b", b"a"))  # type: ignore[arg-type]
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_a_rotation_preserves_lengths_and_spreads_a_large_value() -> None:
    values = torch.zeros(4096)
    values[7] = 100.0
    rotated = forward(Projection(4096, rotate=True, seed=b"s"), values)
    assert float(rotated.norm()) == pytest.approx(100.0, rel=1e-5)
    assert float(rotated.abs().max()) == pytest.approx(100.0 / 32, rel=1e-5)


def test_small_tensors_are_left_as_they_are() -> None:
    assert Projection(1023, rotate=True, every=4).is_identity
    assert not Projection(1024, rotate=True).is_identity


@pytest.mark.parametrize(
    ("keep", "every"), [(0, 1), (1, 1), (0.5, 2), (0.25, 4), (0.1, 10), (0.3, 3), (0.9, 1), (math.nan, 1)]
)
def test_a_share_is_rounded_to_one_of_a_group(keep: float, every: int) -> None:
    assert every_of(keep) == every
