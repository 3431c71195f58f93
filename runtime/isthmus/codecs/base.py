"""What codecs have in common.

Lossy codecs work on segments: at most :data:`SEGMENT` consecutive elements of one tensor, whose encoded size follows
from their number alone. So both sides stream, hold one segment beside the tensors themselves, and know every length
before the data come.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash

from ..tensors import TransferError, bytes_view

SEGMENT = 1 << 15
"""Elements. TopK's positions fit 16 bits, a segment's working set fits a core's cache, and torch does not spread an
operation on so few over threads, whose meeting would take longer than the work where cores are busy."""
RAW_BELOW = 256
"""Tensors with fewer elements (biases, norms) travel as they are: they are little, and every element counts."""
BYTES_RAW = 4.0
"""Bytes per float32 parameter without compression: what the codecs' own figures compare to."""


class CodecError(TransferError):
    """Encoded data that no honest encoder makes, so that sending it again would not help. ``str()`` says what."""


class NonFiniteError(CodecError):
    """Encoded NaN or infinity: of the values, not of the codec."""


class SegmentCodec(ABC):
    """Turns float32 values into bytes, and back into values close to them."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def bytes_per_value(self) -> float:
        """Bytes that one value of a large tensor takes."""

    @abstractmethod
    def size(self, count: int) -> int:
        """Bytes that ``count`` values take."""

    @abstractmethod
    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        """The values (one-dimensional, float32) as ``size(len(values))`` bytes. ``seed`` decides what is random."""

    @abstractmethod
    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        """The values again, from exactly ``size(count)`` bytes. Raises :class:`CodecError`."""


def seed_of(*parts: str | int) -> int:
    """A 64-bit seed that follows from its parts."""
    return xxhash.xxh3_64_intdigest("\x00".join(map(str, parts)).encode())


def upload_seed(round_number: int, pool: str, index: int) -> str:
    """Return the seed of the random choices in an update: both sides know it, and another run repeats it."""
    return f"{round_number}/{pool}/{index}"


def download_seed(round_number: int) -> str:
    """Return the seed of those in a global model."""
    return f"{round_number}/"


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The little-endian bytes of a contiguous tensor."""
    return bytes_view(tensor).tobytes()


def read(data: memoryview, dtype: Any, count: int, offset: int = 0) -> torch.Tensor:
    """A tensor with a copy of ``count`` little-endian numbers, which need not be aligned."""
    return torch.from_numpy(np.frombuffer(data, dtype, count, offset).copy())
