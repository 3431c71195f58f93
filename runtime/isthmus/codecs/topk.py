"""TopK: the largest values of each segment."""

import math

import numpy as np
import torch

from .base import CodecError, SegmentCodec


class TopK(SegmentCodec):
    """Codec that keeps the given share of values, those of largest magnitude, each with a 16-bit position.

    Stich et al., "Sparsified SGD with Memory" (2018): a k-contraction, ||x - TopK(x)||^2 <= (1 - k/d) ||x||^2, which
    holds for a tensor because it holds for each of its segments. It is biased: the client adds the values left out to
    its next update (error feedback; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes", 2019), see ``client/session/error_feedback.py``. The
    kept values are encoded by ``inner``.
    """

    name = "TopK"

    def __init__(self, fraction: float, inner: SegmentCodec) -> None:
        self.fraction = fraction
        self._inner = inner

    @property
    def bytes_per_value(self) -> float:
        return self.fraction * (2 + self._inner.bytes_per_value)

    def kept(self, count: int) -> int:
        """Return the number of values kept of ``count``, at least one."""
        return min(count, max(1, math.ceil(self.fraction * count)))

    def size(self, count: int) -> int:
        kept = self.kept(count)
        return 2 * kept + self._inner.size(kept)

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        positions = values.abs().topk(self.kept(len(values)), sorted=False).indices.sort().values
        return positions.numpy().astype(np.uint16).tobytes() + self._inner.encode(values[positions], seed)

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        kept = self.kept(count)
        positions = torch.from_numpy(np.frombuffer(data, np.uint16, kept).astype(np.int64))
        if (positions.diff() <= 0).any() or int(positions[-1]) >= count:
            raise CodecError("positions that are not ascending or are out of range")
        values = torch.zeros(count, dtype=torch.float32, device="cpu")
        values[positions] = self._inner.decode(data[2 * kept :], kept, seed)
        return values
