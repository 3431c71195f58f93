"""Residual of sparse updates, in half the memory of float32."""

from collections.abc import Sequence

import torch

from ..tensors import State, group, ungroup
from .quantization.stochastic_rounding import dequantize, scales_of

BLOCK, LEVELS = 256, 32767
_CODES, _SCALES = "codes", "scales"


class Residual:
    """Float32 values, stored in 16 bits each with a scale for every block of 256.

    The error of a value is at most 1/65534 of the largest magnitude in its block. This much is lost in every round,
    several thousand times less than the values that TopK sends.
    """

    def __init__(self, tensors: State | None = None) -> None:
        """``tensors``: :attr:`tensors` of an earlier residual. Raises ``ValueError`` for another format."""
        earlier = tensors or {}
        self._codes, self._scales = ungroup(_CODES, earlier), ungroup(_SCALES, earlier)
        if strange := earlier.keys() - self.tensors.keys():
            raise ValueError(f"{min(strange)} is not part of a residual")
        for name, codes in self._codes.items():
            if len(self._scales.get(name, ())) != _blocks(codes.numel()):
                raise ValueError(f"the scales of {name} do not match its values")

    @property
    def tensors(self) -> State:
        """Tensors to be stored in a file."""
        return group(_CODES, self._codes) | group(_SCALES, self._scales)

    def begin(self, name: str, shape: Sequence[int]) -> None:
        """Allocate memory for a tensor's values."""
        codes = self._codes[name] = torch.empty(tuple(shape), dtype=torch.int16, device="cpu")
        self._scales[name] = torch.empty(_blocks(codes.numel()), dtype=torch.float32, device="cpu")

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Store consecutive values (one-dimensional, float32); ``start`` is a multiple of the block size."""
        blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        scales, inverse = map(torch.from_numpy, scales_of(blocks.numpy(), LEVELS))
        # The receiver refuses an update with values that are not finite, so this residual will not be used.
        codes = (blocks * inverse[:, None]).round_().view(-1)[: len(values)]
        self._codes[name].view(-1)[start : start + len(values)] = codes
        first = start // BLOCK
        self._scales[name][first : first + len(scales)] = scales

    def read(self, name: str, shape: Sequence[int], start: int, count: int) -> torch.Tensor | None:
        """Return ``count`` consecutive values of a tensor, or ``None`` if there are none for this shape."""
        codes = self._codes.get(name)
        if codes is None or tuple(codes.shape) != tuple(shape):
            return None
        values = codes.reshape(-1)[start : start + count].float()
        return dequantize(values, self._scales[name][start // BLOCK : _blocks(start + count)], BLOCK)


def _blocks(values: int) -> int:
    return -(-values // BLOCK)
