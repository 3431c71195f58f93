"""Chains: the codecs in a header, in the sender's order, as one object."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import dtype_of
from .base import BYTES_RAW, RAW_BELOW, SEGMENT, CodecError, SegmentCodec
from .plain import Plain
from .quantization.bfloat16 import BFloat16
from .quantization.float16 import Float16
from .quantization.int4 import Int4
from .quantization.int8 import Int8
from .rotation import Rotation
from .topk import TopK

# A new quantizer is added here alone. Codecs of other kinds have a place in `KNOWN` and in `parse_chain`.
_QUANTIZERS: dict[str, type[SegmentCodec]] = {codec.name: codec for codec in (Float16, BFloat16, Int8, Int4)}
_DELTA, _ZSTD = "Delta", "Zstd"
KNOWN = (_DELTA, TopK.name, Rotation.name, *_QUANTIZERS, _ZSTD)
"""Names of all codecs in the protocol; TopK's is followed by its fraction: ``TopK=0.01``."""


@dataclass(frozen=True)
class Chain:
    """Parsed chain of codecs."""

    names: tuple[str, ...]
    delta: bool
    codec: SegmentCodec | None
    """Lossy codec of large floating-point tensors; ``None``: they are sent raw."""
    zstd: bool

    def __str__(self) -> str:
        return "+".join(self.names) or "None"

    @property
    def sparse(self) -> bool:
        """True if the chain leaves values out, so that it needs error feedback."""
        return isinstance(self.codec, TopK)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes per parameter of a large float32 tensor, before Zstd, which adds at most 0.1 %."""
        return self.codec.bytes_per_value if self.codec is not None else BYTES_RAW

    def takes(self, spec: TensorSpec) -> bool:
        """Return whether a tensor goes through the chain's lossy codecs.

        It does if it is of floating point, not tiny, smaller when encoded, and not marked as raw by its sender.
        """
        count = math.prod(spec.shape)
        if self.codec is None or count < RAW_BELOW or spec.raw:
            return False
        dtype = dtype_of(spec)
        return dtype.is_floating_point and self._encoded_size(count) < count * dtype.itemsize

    def size(self, spec: TensorSpec) -> int:
        """Return a tensor's size in the stream, in bytes, before Zstd. Raises :class:`TransferError`."""
        count = math.prod(spec.shape)
        return self._encoded_size(count) if self.takes(spec) else count * dtype_of(spec).itemsize

    def _encoded_size(self, count: int) -> int:
        assert self.codec is not None
        full, rest = divmod(count, SEGMENT)
        return full * self.codec.size(SEGMENT) + (self.codec.size(rest) if rest else 0)


def parse_chain(names: Iterable[str]) -> Chain:
    """Parse the chain in a header or an offer. Raises :class:`CodecError` if it is unknown or invalid."""
    names = tuple(names)
    if unknown := [name for name in names if name.split("=")[0] not in KNOWN]:
        raise CodecError(f"unknown codecs: {', '.join(unknown)}")
    rest = list(names)
    delta = rest[:1] == [_DELTA]
    zstd = rest[-1:] == [_ZSTD]
    rest = rest[delta : len(rest) - zstd]
    codec: SegmentCodec | None = None
    if rest and rest[-1] in _QUANTIZERS:
        codec = _QUANTIZERS[rest.pop()]()
    if rest and rest[-1].startswith(TopK.name):
        codec = TopK(_fraction(rest.pop()), codec or Plain())
    elif rest == [Rotation.name] and codec is not None:
        codec = Rotation(codec)
        rest.clear()
    if rest or (delta and codec is None):
        raise CodecError(f"the codecs {', '.join(names)} are no valid chain")
    return Chain(names, delta, codec, zstd)


def _fraction(name: str) -> float:
    try:
        fraction = float(name.removeprefix(f"{TopK.name}="))
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise CodecError(f"{name} has no valid fraction")
    return fraction
