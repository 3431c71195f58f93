"""Eight bits a value."""

import numpy as np
import torch

from .base import SegmentCodec, bytes_of, read
from .rounding import dequantise, quantise, scales_from

BLOCK, LEVELS = 256, 127


class Int8(SegmentCodec):
    """Stochastic rounding to 255 levels over blocks of 256 values (see :mod:`.rounding`): unbiased, error below
    1/127 of the block's largest magnitude, variance at most a quarter of that squared. Bytes: 1 + 4/256.
    """

    name = "Int8"
    bytes_per_value = 1 + 4 / BLOCK

    def size(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + count

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        scales, codes = quantise(values, BLOCK, LEVELS, seed)
        return bytes_of(scales) + bytes_of(codes[: len(values)].to(torch.int8))

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        scales = scales_from(data, -(-count // BLOCK))
        codes = read(data, np.int8, count, scales.nbytes).float()
        return dequantise(codes, scales, BLOCK)
