"""What sparse updates leave out, in half the memory that it would take as it is."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..tensors import State

BLOCK, LEVELS = 256, 32767
# Blocks with a smaller scale become zeros: its reciprocal must stay finite.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_CODES, _SCALES = "codes/", "scales/"


class Residual:
    """Values of float32, in 16 bits each and a scale for every block of 256.

    Each is off by at most 1/65534 of the largest magnitude in its block. That much is lost in every round, several
    thousand times less than what TopK's share of values stands for.
    """

    def __init__(self, tensors: State | None = None) -> None:
        """``tensors``: those of an earlier one. Raises ``ValueError`` for others."""
        self.tensors: State = tensors or {}
        """As they are kept in a file."""
        for name, tensor in self.tensors.items():
            if name.startswith(_CODES):
                scales = self.tensors.get(_SCALES + name.removeprefix(_CODES))
                if scales is not None and len(scales) == _blocks(tensor.numel()):
                    continue
            elif name.startswith(_SCALES):
                continue
            raise ValueError(f"{name} is no part of a residual")

    def begin(self, name: str, shape: Sequence[int]) -> None:
        """Makes room for a tensor's values."""
        self.tensors[_CODES + name] = torch.empty(tuple(shape), dtype=torch.int16)
        self.tensors[_SCALES + name] = torch.empty(_blocks(math.prod(shape)), dtype=torch.float32)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Lays down consecutive values (one-dimensional, float32); ``start`` is a multiple of a block."""
        blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        numbers = blocks.numpy()  # whose extremes numpy finds sooner
        scales = np.maximum(numbers.max(axis=1), -numbers.min(axis=1)) / np.float32(LEVELS)
        scales[scales < _SMALLEST_SCALE] = 0.0
        inverse = torch.from_numpy(np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0))
        # What is not finite is refused by whoever gets the update, and this residual with it.
        codes = (blocks * inverse[:, None]).round_().view(-1)[: len(values)]
        self.tensors[_CODES + name].view(-1)[start : start + len(values)] = codes
        first = start // BLOCK
        self.tensors[_SCALES + name][first : first + len(scales)] = torch.from_numpy(scales)

    def read(self, name: str, shape: Sequence[int], start: int, count: int) -> torch.Tensor | None:
        """So many consecutive values of a tensor, if there are any for one of this shape."""
        codes = self.tensors.get(_CODES + name)
        if codes is None or tuple(codes.shape) != tuple(shape):
            return None
        values = codes.reshape(-1)[start : start + count].float()
        scales = self.tensors[_SCALES + name][start // BLOCK : _blocks(start + count)]
        padded = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
        return padded.mul_(scales[:, None]).view(-1)[:count]


def _blocks(values: int) -> int:
    return -(-values // BLOCK)
