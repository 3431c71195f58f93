"""State dicts through a chain, into the bytes that travel."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import xxhash

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import CHUNK_BYTES, State, bytes_view, checked, roomy, specs_of
from . import zstd
from .base import SEGMENT, seed_of
from .chain import Chain
from .delta import difference


@dataclass
class Encoded:
    """An encoded state dict: what a header says of it, and its data, which may be sent any number of times."""

    chain: Chain
    specs: list[TensorSpec] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    checksum: str = ""
    residual: State | None = None
    """What a sparse chain left out: the sender's next update makes up for it, once this one is accepted."""

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return sum(map(len, self.chunks))


def encode(
    state: Mapping[str, torch.Tensor],
    chain: Chain,
    seed: str,
    base: State | None = None,
    residual: State | None = None,
    *,
    keep_base: bool = True,
    room: State | None = None,
) -> Encoded:
    """Encodes tensor by tensor, on whatever device they are. Raises :class:`TransferError` for what cannot travel.

    ``base`` is what a Delta is taken from, ``residual`` what earlier updates left out, ``seed`` names the job, the
    round and the sender. A sparse chain lays the new residual into ``room``, tensors that nobody needs any more, or,
    without ``keep_base``, into the base's memory.
    """
    encoded = Encoded(chain, residual={} if chain.sparse else None)
    if base and not keep_base:
        room = {**base, **(room or {})}
    run = _Run(chain, seed, base or {}, residual or {}, encoded, room or {})
    digest = xxhash.xxh3_128()
    pieces = _gathered(piece for name, tensor in state.items() for piece in run.pieces(name, checked(name, tensor)))
    for chunk in zstd.compressed(pieces) if chain.zstd else pieces:
        digest.update(chunk)
        encoded.chunks.append(chunk)
    encoded.checksum = digest.hexdigest()
    return encoded


class _Run:
    """One encoding."""

    def __init__(self, chain: Chain, seed: str, base: State, residual: State, encoded: Encoded, room: State) -> None:
        self._chain = chain
        self._seed = seed
        self._base = base if chain.delta else {}
        self._residual = residual
        self._encoded = encoded
        self._room = room

    def pieces(self, name: str, tensor: torch.Tensor) -> Iterator[bytes]:
        """One tensor's bytes."""
        tensor = tensor.detach().to("cpu").contiguous()
        (spec,) = specs_of({name: tensor})
        spec.size = self._chain.size(spec)
        self._encoded.specs.append(spec)
        if not self._chain.takes(spec):
            data = bytes_view(tensor)
            for start in range(0, len(data), CHUNK_BYTES):
                yield bytes(data[start : start + CHUNK_BYTES])
            return
        codec, flat = self._chain.codec, tensor.reshape(-1)
        assert codec is not None
        base = self._flat(self._base, name, tensor)
        before = self._flat(self._residual, name, tensor)
        after = self._new_residual(name, tensor)
        for number, start in enumerate(range(0, len(flat), SEGMENT)):
            cut = slice(start, start + SEGMENT)
            change = difference(flat[cut], None if base is None else base[cut])
            if before is not None:
                change += before[cut]
            seed = seed_of(self._seed, name, number)
            data_of_segment = codec.encode(change, seed)
            if after is not None:
                change -= codec.decode(memoryview(data_of_segment), len(change), seed)
                after[cut] = change
            yield data_of_segment

    @staticmethod
    def _flat(state: State, name: str, like: torch.Tensor) -> torch.Tensor | None:
        found = state.get(name)
        return None if found is None or found.shape != like.shape else found.reshape(-1)

    def _new_residual(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Where the tensor's new residual goes."""
        if self._encoded.residual is None:
            return None
        after = roomy(name, tensor.shape, torch.float32, self._room)
        self._encoded.residual[name] = after
        return after.reshape(-1)


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, small ones joined, none above a chunk's size."""
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > CHUNK_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
        gathered.append(piece)
        size += len(piece)
    if size:
        yield b"".join(gathered)
