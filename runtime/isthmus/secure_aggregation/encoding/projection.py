"""Public linear maps of a tensor's change before it is quantised: a random rotation, and a choice of coordinates."""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ...codecs.rotation import BLOCK, signs

# Values processed at a time, so that intermediate results stay in the processor's cache.
_PART = 1 << 16
# Smaller tensors are neither rotated nor thinned out: there is nothing to save, and a block of a rotation has 1,024
# values.
LEAST = BLOCK
_SIDE = 32
# Walsh-Hadamard matrix of size 32, by Sylvester's construction: H(2n) = [[1, 1], [1, -1]] x H(n).
_HADAMARD = torch.from_numpy(functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * 5))


@dataclass(frozen=True)
class Part:
    """Part of a tensor's flat values, and the masked coordinates that it becomes."""

    values: slice
    coordinates: slice


class Projection:
    """Map from a tensor's values to its masked coordinates, and back. All clients use the same one in a round.

    ``rotate``: a randomised Hadamard transform of blocks of 1,024 values (:mod:`isthmus.codecs.rotation`), so that
    coordinates of very different size become about equal, and need a smaller clip.

    ``every`` above 1: one coordinate of each group of ``every`` is kept (random-k, Konecny et al., "Federated Learning:
    Strategies for Improving Communication Efficiency", 2016, section 2), at a place that the seed determines. The
    others count as unchanged. The kept ones are not multiplied by ``every``, although the sum would then be unbiased:
    all clients keep the same ones (others could not be summed), so the mean over clients would not reduce that
    variance. Clients add what they left out to their next change instead (error feedback: Stich et al., "Sparsified SGD
    with Memory", 2018).
    """

    def __init__(self, count: int, *, rotate: bool = False, every: int = 1, seed: bytes = b"") -> None:
        """``count``: number of values. ``seed``: public, of this tensor in this round."""
        self._count = count
        small = count < LEAST
        self._rotates = rotate and not small
        self._every = 1 if small else max(every, 1)
        self._padded = count + (-count % BLOCK if self._rotates else 0)
        self.coordinates = -(-self._padded // self._every)
        """Number of masked coordinates."""
        digest = hashlib.sha256(b"isthmus projection" + seed).digest()
        self._signs_key = int.from_bytes(digest[:16], "big")
        self._places_key = int.from_bytes(digest[16:], "big")

    @property
    def leaves_out(self) -> bool:
        """True if the coordinates are fewer than the values."""
        return self._every > 1

    @property
    def is_identity(self) -> bool:
        """True if the coordinates are the values themselves."""
        return not self._rotates and self._every == 1

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the tensor in order."""
        # A multiple of the groups of 4 words that the generator makes at a time, and of the rotation's blocks.
        step = _PART if self._every == 1 else BLOCK * self._every * max(1, _PART // BLOCK // self._every)
        for start in range(0, self._padded, step):
            stop = min(start + step, self._padded)
            coordinates = slice(start // self._every, -(-stop // self._every))
            yield Part(slice(start, min(stop, self._count)), coordinates)

    def forward(self, part: Part, values: torch.Tensor) -> torch.Tensor:
        """Return the coordinates of a part. ``values`` (its values, float32 or float64) may be overwritten."""
        if self._rotates:
            values = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
            values = _transform(values.mul_(self._signs(part, len(values))))
        return values if self._every == 1 else values[self._places(part, len(values))]

    def backward(self, part: Part, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the values of a part whose coordinates are given; those that were not kept are 0."""
        length = part.values.stop - part.values.start
        whole = length + (-length % BLOCK if self._rotates else 0)
        if self._every > 1:
            values = torch.zeros(whole, dtype=coordinates.dtype, device="cpu")
            values[self._places(part, whole)] = coordinates
            coordinates = values
        if not self._rotates:
            return coordinates
        return _transform(coordinates).mul_(self._signs(part, whole))[:length]

    def _signs(self, part: Part, count: int) -> torch.Tensor:
        return signs(self._signs_key, count, part.values.start)

    def _places(self, part: Part, count: int) -> torch.Tensor:
        """Return the index within a part of ``count`` values of the coordinate that each group keeps."""
        first, groups = part.coordinates.start, part.coordinates.stop - part.coordinates.start
        drawn = np.random.Philox(key=self._places_key).advance(first // 4).random_raw(groups)
        starts = np.arange(0, groups * self._every, self._every, dtype=np.int64)
        sizes = np.minimum(self._every, count - starts)  # the last group may be smaller
        return torch.from_numpy(starts + (drawn % sizes.astype(np.uint64)).astype(np.int64))


def _transform(values: torch.Tensor) -> torch.Tensor:
    """Apply the orthonormal Walsh-Hadamard transform, which is its own inverse, to each block.

    The one of size 1,024 is the Kronecker product of two of size 32, so it is two products with small matrices. Their
    last bits depend on the machine, which a sum does not see: only its receiver undoes the rotation.
    """
    hadamard = _HADAMARD.to(values.dtype)
    rows = (values.view(-1, _SIDE) @ hadamard).view(-1, _SIDE, _SIDE)
    return torch.matmul(hadamard / _SIDE, rows).view(-1)


def every_of(keep: float) -> int:
    """Return the size of the groups of which one coordinate is kept, for a share of coordinates to keep.

    0 and 1 keep everything; other shares are rounded to 1/2, 1/3, and so on.
    """
    return 1 if not 0 < keep < 1 or not math.isfinite(keep) else max(1, round(1 / keep))
