"""Int4: four bits per value."""

import numpy as np
import torch

from ..base import SegmentCodec, bytes_of, read
from .stochastic_rounding import dequantize, quantize, scales_from

BLOCK, LEVELS = 128, 7


class Int4(SegmentCodec):
    """Stochastic rounding to 15 levels over blocks of 128 values, two values a byte (see :mod:`.stochastic_rounding`).

    Unbiased; the error is below 1/7 of the block's largest magnitude, and the variance at most a quarter of that error
    squared. Takes 1/2 + 4/128 bytes per value.
    """

    name = "Int4"
    bytes_per_value = 0.5 + 4 / BLOCK

    def size(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + -(-count // 2)

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        scales, codes = quantize(values, BLOCK, LEVELS, seed)
        pairs = codes.add_(LEVELS + 1).to(torch.uint8).view(-1, 2)
        packed = pairs[:, 0] | (pairs[:, 1] << 4)
        return bytes_of(scales) + bytes_of(packed[: -(-len(values) // 2)])

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        scales = scales_from(data, -(-count // BLOCK))
        packed = read(data, np.uint8, -(-count // 2), scales.nbytes)
        codes = torch.stack((packed & 15, packed >> 4), 1).view(-1)[:count].float().sub_(LEVELS + 1)
        return dequantize(codes, scales, BLOCK)
