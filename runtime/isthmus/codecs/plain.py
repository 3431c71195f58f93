"""Uncompressed float32, the last codec of a chain without a quantizer."""

import numpy as np
import torch

from .base import BYTES_RAW, SegmentCodec, bytes_of, read


class Plain(SegmentCodec):
    """Four bytes per value, no error."""

    name = "Float32"
    bytes_per_value = BYTES_RAW

    def size(self, count: int) -> int:
        return 4 * count

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        return bytes_of(values)

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        return read(data, np.float32, count)
