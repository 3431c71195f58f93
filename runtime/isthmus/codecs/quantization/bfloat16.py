"""BFloat16: the upper half of float32."""

import numpy as np
import torch

from ..base import SegmentCodec, bytes_of, read


class BFloat16(SegmentCodec):
    """Two bytes per value; relative error at most 2^-8, float32's range.

    Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training" (2019).
    """

    name = "BFloat16"
    bytes_per_value = 2.0

    def size(self, count: int) -> int:
        return 2 * count

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        return bytes_of(values.to(torch.bfloat16))

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        return read(data, np.int16, count).view(torch.bfloat16).float()
