"""Decoding of received bytes to tensors, as they arrive."""

from collections.abc import Callable, Iterable, Iterator

import torch
import xxhash

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import CHUNK_BYTES, ChecksumError, Data, State, TransferError, TruncatedError, allocate, bytes_view
from .base import SEGMENT, CodecError, seed_of
from .chain import Chain
from .delta import applied
from .zstd import Unpacker

# The size of a unit of the stream in bytes, and the function that consumes it.
_Unit = tuple[int, Callable[[memoryview], None]]


class Decoder:
    """Receiver of an encoded stream. Beside the decoded tensors it holds less than two chunks."""

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        chain: Chain,
        seed: str,
        base: State | None = None,
        room: State | None = None,
    ) -> None:
        """Allocate the decoded tensors, in ``room`` where it fits (see :func:`allocate`).

        Raises :class:`TransferError` for invalid specs.
        """
        self._chain = chain
        self._seed = seed
        self._base = (base or {}) if chain.delta else {}
        self._tensors: State = {}
        specs = list(specs)
        for spec in specs:
            if spec.name in self._tensors:
                raise CodecError(f"{spec.name} is announced twice")
            if spec.size != (size := chain.size(spec)):
                raise CodecError(f"{spec.name}: {spec.size} bytes announced, but {chain} encodes it as {size}")
            self._tensors[spec.name] = allocate(spec, room)
        self._units = self._all_units(specs)
        self._unit = next(self._units, None)
        self._unpacker = Unpacker() if chain.zstd else None
        self._buffer = bytearray()
        self._digest = xxhash.xxh3_128()
        self.received = 0
        """Encoded bytes received so far."""

    def write(self, data: Data) -> None:
        """Receive one chunk. Raises :class:`TransferError` if there is more data than announced, or it is invalid."""
        self._digest.update(data)
        self.received += len(data)
        for plain in self._unpacker.unpack(data) if self._unpacker is not None else (data,):
            self._take(plain)

    def finish(self, checksum: str) -> State:
        """Return the tensors of a complete stream. Raises :class:`TransferError` if it is incomplete or damaged."""
        if self._unit is not None or (self._unpacker is not None and not self._unpacker.empty):
            raise TruncatedError(f"the stream ended early, after {self.received} bytes")
        if self._digest.hexdigest() != checksum:
            raise ChecksumError("the checksum does not match the data")
        return self._tensors

    def _take(self, data: Data) -> None:
        self._buffer += data
        start = 0
        while self._unit is not None and len(self._buffer) - start >= self._unit[0]:
            size, sink = self._unit
            sink(memoryview(bytes(memoryview(self._buffer)[start : start + size])))
            start += size
            self._unit = next(self._units, None)
        if self._unit is None and start < len(self._buffer):
            raise TransferError("more data than the header announced")
        del self._buffer[:start]

    def _all_units(self, specs: list[TensorSpec]) -> Iterator[_Unit]:
        for spec in specs:
            tensor = self._tensors[spec.name]
            yield from self._lossy_units(spec.name, tensor) if self._chain.takes(spec) else _raw_units(tensor)

    def _lossy_units(self, name: str, tensor: torch.Tensor) -> Iterator[_Unit]:
        codec, flat = self._chain.codec, tensor.reshape(-1)
        assert codec is not None
        base = self._base.get(name)
        if base is not None and base.shape != tensor.shape:
            raise CodecError(f"{name} has another shape than in the base model")
        flat_base = None if base is None else base.reshape(-1)
        for number, start in enumerate(range(0, len(flat), SEGMENT)):
            out = flat[start : start + SEGMENT]
            from_base = None if flat_base is None else flat_base[start : start + SEGMENT]
            seed = seed_of(self._seed, name, number)

            def sink(
                data: memoryview, out: torch.Tensor = out, base: torch.Tensor | None = from_base, seed: int = seed
            ) -> None:
                try:
                    applied(codec.decode(data, len(out), seed), base, out)
                except CodecError as error:
                    raise type(error)(f"{name} holds {error}") from None

            yield codec.size(len(out)), sink


def _raw_units(tensor: torch.Tensor) -> Iterator[_Unit]:
    view = bytes_view(tensor)
    for start in range(0, len(view), CHUNK_BYTES):
        part = view[start : start + CHUNK_BYTES]

        def sink(data: memoryview, part: memoryview = part) -> None:
            part[:] = data

        yield len(part), sink
