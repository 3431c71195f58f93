"""Interface and helpers of codecs.

Lossy codecs work on segments: at most :data:`SEGMENT` consecutive elements of one tensor, whose encoded size depends
only on their number. So both sides can stream, with one segment in memory beside the tensors themselves, and know all
lengths before the data arrive.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash

from ..tensors import TransferError, bytes_view

SEGMENT = 1 << 15
"""Maximum number of elements. TopK's positions fit 16 bits, a segment's working set fits a core's cache, and torch does
not split operations of this size among threads, whose synchronisation would take longer than the work on busy cores."""
RAW_BELOW = 256
"""Tensors with fewer elements (biases, norms) are sent raw: they are small, and every element matters."""
BYTES_RAW = 4.0
"""Bytes per float32 parameter without compression."""


class CodecError(TransferError):
    """Encoded data that no correct encoder produces, so that a retry would not help. ``str()`` gives the reason."""


class NonFiniteError(CodecError):
    """Encoded NaN or infinity, which was in the values."""


class SegmentCodec(ABC):
    """Codec that encodes float32 values as bytes, and decodes them to values close to them."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def bytes_per_value(self) -> float:
        """Bytes per value of a large tensor."""

    @abstractmethod
    def size(self, count: int) -> int:
        """Return the encoded size of ``count`` values in bytes."""

    @abstractmethod
    def encode(self, values: torch.Tensor, seed: int) -> bytes:
        """Encode values (one-dimensional, float32) as ``size(len(values))`` bytes. ``seed``: of random choices."""

    @abstractmethod
    def decode(self, data: memoryview, count: int, seed: int) -> torch.Tensor:
        """Decode exactly ``size(count)`` bytes to ``count`` float32 values. Raises :class:`CodecError`."""


def seed_of(*parts: str | int) -> int:
    """Derive a 64-bit seed from parts."""
    return xxhash.xxh3_64_intdigest("\x00".join(map(str, parts)).encode())


def upload_seed(round_number: int, pool: str, index: int) -> str:
    """Return the seed of the random choices in an update, which both sides know and every run repeats."""
    return f"{round_number}/{pool}/{index}"


def download_seed(round_number: int) -> str:
    """Return the seed of the random choices in a global model."""
    return f"{round_number}/"


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the little-endian bytes of a contiguous tensor."""
    return bytes_view(tensor).tobytes()


def read(data: memoryview, dtype: Any, count: int, offset: int = 0) -> torch.Tensor:
    """Copy ``count`` little-endian numbers, which need not be aligned, into a tensor."""
    return torch.from_numpy(np.frombuffer(data, dtype, count, offset).copy())
