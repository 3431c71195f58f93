"""Stochastic rounding to a few integer levels, with one scale for each block of values: what Int8 and Int4 share.

A block is scaled so that its largest magnitude is the top level; each value then becomes one of the two integers
around it, the nearer the likelier, so that its expectation is the value itself. This is QSGD's quantiser, with the
maximum instead of the Euclidean norm as the scale, as its authors use it in their experiments: Alistarh et al., "QSGD:
Communication-Efficient SGD via Gradient Quantization and Encoding" (2017), sections 3.1 and 5.
"""

import numpy as np
import numpy.typing as npt
import torch

from ..base import CodecError, NonFiniteError, read

Floats = npt.NDArray[np.float32]

# Blocks with a smaller scale become zeros: its reciprocal must stay finite.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def quantise(values: torch.Tensor, block: int, levels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks' scales (float32), and the values' codes as float32 integers from -levels to levels, padded to whole
    blocks. A block with NaN or infinity gets such a scale."""
    # In numpy, which computes in this thread alone.
    blocks = np.pad(values.numpy(), (0, -len(values) % block)).reshape(-1, block)
    scales, inverse = scales_of(blocks, levels)
    # Sixteen random bits a value, centred: the expectation is off by nothing, each probability by at most 2^-17.
    drawn = np.random.SFC64(seed).random_raw(-(-blocks.size // 4)).view(np.int16)[: blocks.size]
    codes = drawn.astype(np.float32).reshape(blocks.shape)
    codes *= np.float32(2.0**-16)
    codes += np.float32(0.5 + 2.0**-17)
    with np.errstate(invalid="ignore"):  # infinity times its inverse: the scale tells the receiver
        codes += blocks * inverse[:, None]
    np.floor(codes, out=codes)
    np.clip(codes, -levels, levels, out=codes)
    return torch.from_numpy(scales), torch.from_numpy(codes.reshape(-1))


def scales_of(blocks: Floats, levels: int) -> tuple[Floats, Floats]:
    """What brings the largest magnitude in each row to the top level, and its reciprocal: 0 where that is too small."""
    # Sooner than the largest of the absolute values.
    scales = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(levels)
    scales[scales < _SMALLEST_SCALE] = 0.0
    return scales, np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """The values again, from their codes as float32."""
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % block)).view(-1, block)
    return padded.mul_(scales[:, None]).view(-1)[: len(codes)]


def scales_from(data: memoryview, count: int) -> torch.Tensor:
    """The scales at the beginning of encoded data. Raises :class:`CodecError` for any that is none."""
    scales = read(data, np.float32, count)
    if not torch.isfinite(scales).all():
        raise NonFiniteError("NaN or infinity (in a block's scale)")
    if (scales < 0).any():
        raise CodecError("a block with a negative scale")
    return scales
