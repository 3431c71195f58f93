"""Random rotation before quantisation."""

import numpy as np
import numpy.typing as npt
import torch

from .base import SegmentCodec

_SIDE = 32
BLOCK = _SIDE * _SIDE

_Floats = npt.NDArray[np.float32]


class Rotation(SegmentCodec):
    """Rotates blocks of 1,024 values by a randomised Hadamard transform, so that no single large value spoils the
    scale of its block, and undoes it after decoding.

    Suresh et al., "Distributed Mean Estimation with Limited Communication" (2017), section 3: random signs, then
    Walsh-Hadamard. The rotation is orthogonal, so lengths, and the unbiasedness of what follows, stay. Its signs come
    from the seed, which both sides know. The last values of a tensor are filled up to a whole block.
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
        return self._inner.encode(_transform(padded * _signs(seed, len(padded))), seed)

    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        rotated = self._inner.decode(data, _padded(count), seed)
        return _transform(rotated).mul_(_signs(seed, len(rotated)))[:count]


def _padded(count: int) -> int:
    return count + -count % BLOCK


def _signs(seed: int, count: int) -> torch.Tensor:
    """``count`` (a multiple of 64) random signs. Philox's stream is fixed by its paper, so that all versions agree."""
    drawn = np.random.Philox(key=seed).random_raw(count // 64).astype("<u8").view(np.uint8)
    return torch.from_numpy(np.unpackbits(drawn)).float().mul_(2).sub_(1)


def _transform(values: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of each block: its own inverse.

    By sums and differences alone, in a fixed order, so that every machine computes the same bits; a matrix product
    would depend on its library's kernels.
    """
    blocks = values.numpy().reshape(-1, _SIDE, _SIDE)
    # H of size 32 * 32 is the Kronecker product of two of size 32: along the one side, then along the other.
    for _ in range(2):
        blocks = np.ascontiguousarray(_along_rows(blocks).transpose(0, 2, 1))
    blocks *= np.float32(1 / _SIDE)
    return torch.from_numpy(blocks.reshape(-1))


def _along_rows(blocks: _Floats) -> _Floats:
    """The unscaled transform over the middle axis."""
    source, half = blocks, 1
    while half < _SIDE:
        pairs = source.reshape(-1, 2, half * _SIDE)
        target = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=target[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=target[:, 1])
        source, half = target, 2 * half
    return source.reshape(blocks.shape)
