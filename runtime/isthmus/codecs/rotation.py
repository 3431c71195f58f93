"""Rotation: a random rotation before quantization."""

import numpy as np
import numpy.typing as npt
import torch

from .base import SegmentCodec

_SIDE = 32
BLOCK = _SIDE * _SIDE

_Floats = npt.NDArray[np.float32]


class Rotation(SegmentCodec):
    """Randomised Hadamard transform of blocks of 1,024 values, so that no large value determines its block's scale.

    It is undone after decoding.

    Suresh et al., "Distributed Mean Estimation with Limited Communication" (2017), section 3: random signs, then
    Walsh-Hadamard. The rotation is orthogonal, so it preserves lengths and the inner codec's unbiasedness. The signs
    are derived from the seed, which both sides know. The last values of a tensor are padded to a whole block.
    """

    name = "Rotation"

    def __init__(self, inner: SegmentCodec) -> None:
        self._inner = inner

    @property
    def bytes_per_value(self) -> float:
        return self._inner.bytes_per_value

    def size(self, count: int) -> int:
        return self._inner.size(_padded(count))

    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
        return self._inner.encode(_transform(padded * signs(seed, len(padded))), seed)

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        rotated = self._inner.decode(data, _padded(count), seed)
        return _transform(rotated).mul_(signs(seed, len(rotated)))[:count]


def _padded(count: int) -> int:
    return count + -count % BLOCK


def signs(seed: int, count: int, start: int = 0) -> torch.Tensor:
    """Return ``count`` (a multiple of 64) random signs, the same in all versions: Philox is specified by its paper.

    ``start`` (a multiple of 256): number of signs of the sequence that are left out.
    """
    generator = np.random.Philox(key=seed).advance(start // 256)  # it counts steps, which make four words
    drawn = generator.random_raw(count // 64).astype("<u8").view(np.uint8)
    return torch.from_numpy(np.unpackbits(drawn)).float().mul_(2).sub_(1)


def _transform(values: torch.Tensor) -> torch.Tensor:
    """Apply the orthonormal Walsh-Hadamard transform, which is its own inverse, to each block.

    It consists of sums and differences in a fixed order, so that every machine computes the same bits; a matrix product
    would depend on the library's kernels.
    """
    blocks = values.numpy().reshape(-1, _SIDE, _SIDE)
    # H of size 32 * 32 is the Kronecker product of two of size 32: along the one side, then along the other.
    for _ in range(2):
        blocks = np.ascontiguousarray(_along_rows(blocks).transpose(0, 2, 1))
    blocks *= np.float32(1 / _SIDE)
    return torch.from_numpy(blocks.reshape(-1))


def _along_rows(blocks: _Floats) -> _Floats:
    """Apply the unscaled transform along the middle axis."""
    source, half = blocks, 1
    while half < _SIDE:
        pairs = source.reshape(-1, 2, half * _SIDE)
        target = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=target[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=target[:, 1])
        source, half = target, 2 * half
    return source.reshape(blocks.shape)
