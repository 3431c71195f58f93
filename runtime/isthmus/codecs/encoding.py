"""State dicts through a chain, into the bytes that travel."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import xxhash

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import CHUNK_BYTES, State, bytes_view, checked, specs_of
from . import zstd
from .base import SEGMENT, NonFiniteError, seed_of
from .chain import Chain
from .delta import difference
from .residual import Residual


@dataclass
class Encoded:
    """An encoded state dict: what a header says of it, and its data, which may be sent any number of times."""

    chain: Chain
    specs: list[TensorSpec] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    checksum: str = ""
    residual: Residual | None = None
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
    residual: Residual | None = None,
    *,
    keep_base: bool = True,
) -> Encoded:
    """Encodes tensor by tensor, on whatever device they are. Raises :class:`TransferError` for what cannot travel.

    ``base`` is what a Delta is taken from, ``residual`` what earlier updates left out, ``seed`` names the job, the
    round and the sender. Without ``keep_base`` each of its tensors is taken out once it has been used: the new residual
    of a sparse chain then never stands beside all of it.
    """
    encoded = Encoded(chain, residual=Residual() if chain.sparse else None)
    base = base or {}
    run = _Run(chain, seed, dict(base) if keep_base else base, residual or Residual(), encoded)
    digest = xxhash.xxh3_128()
    pieces = _gathered(piece for name, tensor in state.items() for piece in run.pieces(name, checked(name, tensor)))
    for chunk in zstd.compressed(pieces) if chain.zstd else pieces:
        digest.update(chunk)
        encoded.chunks.append(chunk)
    encoded.checksum = digest.hexdigest()
    return encoded


class _Run:
    """One encoding."""

    def __init__(self, chain: Chain, seed: str, base: State, residual: Residual, encoded: Encoded) -> None:
        self._chain = chain
        self._seed = seed
        self._base = base
        self._residual = residual
        self._encoded = encoded

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
        base = self._flat_base(name, tensor)
        after = self._encoded.residual
        if after is not None:
            after.begin(name, tensor.shape)
        for number, start in enumerate(range(0, len(flat), SEGMENT)):
            cut = slice(start, start + SEGMENT)
            change = difference(flat[cut], None if base is None else base[cut])
            if (before := self._residual.read(name, tensor.shape, start, len(change))) is not None:
                change += before
            seed = seed_of(self._seed, name, number)
            data_of_segment = codec.encode(change, seed)
            if after is not None:
                # Whoever gets NaN or infinity refuses it, and with it this residual.
                with contextlib.suppress(NonFiniteError):
                    change -= codec.decode(memoryview(data_of_segment), len(change), seed)
                after.write(name, start, change)
            yield data_of_segment

    def _flat_base(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """What a tensor's Delta is taken from, which is not needed again."""
        found = self._base.pop(name, None)
        return found.reshape(-1) if self._chain.delta and found is not None and found.shape == like.shape else None


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
