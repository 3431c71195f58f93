"""Int8: eight bits per value."""

import numpy as np
import torch

from ..base import SegmentCodec, bytes_of, read
from .stochastic_rounding import dequantize, quantize, scales_from

BLOCK, LEVELS = 256, 127


class Int8(SegmentCodec):
    """Stochastic rounding to 255 levels over blocks of 256 values (see :mod:`.stochastic_rounding`).

    Unbiased; the error is below 1/127 of the block's largest magnitude, and the variance at most a quarter of that
    error squared. Takes 1 + 4/256 bytes per value.
    """

    name = "Int8"
    bytes_per_value = 1 + 4 / BLOCK

    def size(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + count

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        scales, codes = quantize(values, BLOCK, LEVELS, seed)
        return bytes_of(scales) + bytes_of(codes[: len(values)].to(torch.int8))

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        scales = scales_from(data, -(-count // BLOCK))
        codes = read(data, np.int8, count, scales.nbytes).float()
        return dequantize(codes, scales, BLOCK)
