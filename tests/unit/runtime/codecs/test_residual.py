"""Residual with 16 bits per value."""

import pytest
import torch

from isthmus.codecs import Residual
from isthmus.codecs.base import SEGMENT
from isthmus.codecs.residual import BLOCK


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 2 * SEGMENT + 77])
def test_each_value_is_as_near_as_its_block_allows(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-25, 30, count)
    residual = Residual()
    residual.begin("w", (count,))
    for start in range(0, count, SEGMENT):
        residual.write("w", start, values[start : start + SEGMENT])
    for start in range(0, count, SEGMENT):
        part = values[start : start + SEGMENT]
        read = residual.read("w", (count,), start, len(part))
        assert read is not None
        for block, found in zip(part.split(BLOCK), read.split(BLOCK), strict=True):
            # Half a step, plus the rounding of float32.
            assert (found.double() - block.double()).abs().max() <= block.abs().max().double() * (1 / 65534 + 2e-7)


def test_zeros_stay_zeros_and_the_smallest_numbers_do_no_harm() -> None:
    values = torch.cat([torch.zeros(BLOCK), torch.full((BLOCK,), 1e-44)])
    residual = Residual()
    residual.begin("w", values.shape)
    residual.write("w", 0, values)
    read = residual.read("w", values.shape, 0, len(values))
    assert read is not None
    assert torch.equal(read[:BLOCK], values[:BLOCK])
    assert (read - values).abs().max() <= 1e-44


def test_another_shape_has_none() -> None:
    residual = Residual()
    residual.begin("w", (2, 3))
    residual.write("w", 0, torch.ones(6))
    assert residual.read("w", (3, 2), 0, 6) is None
    assert residual.read("v", (2, 3), 0, 6) is None
    assert residual.read("w", (2, 3), 0, 6) is not None


def test_it_takes_half_the_memory() -> None:
    residual = Residual()
    residual.begin("w", (1000, 1000))
    assert sum(tensor.nbytes for tensor in residual.tensors.values()) < 0.51 * 4_000_000
