"""Float16: IEEE 754 half precision."""

import numpy as np
import torch

from ..base import SegmentCodec, bytes_of, read

_LARGEST = 65504.0


class Float16(SegmentCodec):
    """Two bytes per value; relative error at most 2^-11 from 6.1e-5 up, absolute error at most 2^-25 below.

    Micikevicius et al., "Mixed Precision Training" (2018). Finite values beyond the range of half precision are
    clamped; infinity becomes NaN, so that the receiver refuses it.
    """

    name = "Float16"
    bytes_per_value = 2.0

    def size(self, count: int) -> int:
        return 2 * count

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        # values - values is 0 for finite values and NaN for others, which the clamp alone would hide.
        return bytes_of(values.clamp(-_LARGEST, _LARGEST).add_(values - values).to(torch.float16))

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        return read(data, np.float16, count).float()
