"""Stochastic rounding to a few integer levels, with one scale per block of values; used by Int8 and Int4.

A block is scaled so that its largest magnitude is the top level; each value then becomes one of the two integers
around it, with probabilities such that its expectation is the value itself. This is QSGD's quantizer with the maximum
instead of the Euclidean norm as the scale, as in its authors' experiments: Alistarh et al., "QSGD:
Communication-Efficient SGD via Gradient Quantization and Encoding" (2017), sections 3.1 and 5.
"""

import numpy as np
import numpy.typing as npt
import torch

from ..base import CodecError, NonFiniteError, read

Floats = npt.NDArray[np.float32]

# Blocks with a smaller scale become zeros: its reciprocal must stay finite.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def quantize(values: torch.Tensor, block: int, levels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks' scales (float32, shape (blocks,)) and the values' codes (float32, padded to whole blocks).

    Codes are integers from -levels to levels. A block with NaN or infinity gets a scale that is not finite.
    """
    # In numpy, which computes in this thread only.
    blocks = np.pad(values.numpy(), (0, -len(values) % block)).reshape(-1, block)
    scales, inverse = scales_of(blocks, levels)
    # Sixteen random bits per value, centred: the expectation is exact, and each probability is off by at most 2^-17.
    drawn = np.random.SFC64(seed).random_raw(-(-blocks.size // 4)).view(np.int16)[: blocks.size]
    codes = drawn.astype(np.float32).reshape(blocks.shape)
    codes *= np.float32(2.0**-16)
    codes += np.float32(0.5 + 2.0**-17)
    with np.errstate(invalid="ignore"):  # infinity times its inverse; the scale shows it to the receiver
        codes += blocks * inverse[:, None]
    np.floor(codes, out=codes)
    np.clip(codes, -levels, levels, out=codes)
    return torch.from_numpy(scales), torch.from_numpy(codes.reshape(-1))


def scales_of(blocks: Floats, levels: int) -> tuple[Floats, Floats]:
    """Return the scale that maps each row's largest magnitude to the top level, and its reciprocal.

    Both are 0 if the scale is too small for a finite reciprocal. Shapes: (rows,).
    """
    # Faster than the maximum of the absolute values.
    scales = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(levels)
    scales[scales < _SMALLEST_SCALE] = 0.0
    return scales, np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Return the values for codes, both one-dimensional float32."""
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % block)).view(-1, block)
    return padded.mul_(scales[:, None]).view(-1)[: len(codes)]


def scales_from(data: memoryview, count: int) -> torch.Tensor:
    """Return the scales at the beginning of encoded data. Raises :class:`CodecError` if one is invalid."""
    scales = read(data, np.float32, count)
    if not torch.isfinite(scales).all():
        raise NonFiniteError("NaN or infinity (in a block's scale)")
    if (scales < 0).any():
        raise CodecError("a block with a negative scale")
    return scales
