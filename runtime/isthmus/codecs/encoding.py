"""State dicts through a chain, into the bytes that travel."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import xxhash

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import CHUNK_BYTES, State, bytes_view, checked, flat, specs_of
from . import zstd
from .base import SEGMENT, NonFiniteError, seed_of
from .chain import Chain
from .delta import difference, landed
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
    raw: Collection[str] = (),
    frozen: Collection[str] = (),
    keep_base: bool = True,
) -> Encoded:
    """Encodes tensor by tensor, on whatever device they are. Raises :class:`TransferError` for what cannot travel.

    ``base`` is what a Delta is taken from, ``residual`` what earlier updates left out, ``seed`` names the round
    and the sender. Without ``keep_base`` each of its tensors is taken out once it has been used: the new residual
    of a sparse chain then never stands beside all of it.

    Lossy codecs and error feedback suit changes that add up, as the steps of gradient descent do. The statistics of a
    batch-norm layer, say, are no sum of changes: half a change may carry a variance below zero, and one that is made up
    for later comes a second time. So tensors named in ``raw`` pass the lossy codecs by, as do those named in ``frozen``
    (no gradient trains them) that differ from the base all the same.
    """
    encoded = Encoded(chain, residual=Residual() if chain.sparse else None)
    base = dict(base or {}) if keep_base else base or {}
    run = _Run(chain, seed, base, residual or Residual(), frozenset(raw), frozenset(frozen), encoded)
    digest = xxhash.xxh3_128()
    pieces = _gathered(piece for name, tensor in state.items() for piece in run.pieces(name, checked(name, tensor)))
    for chunk in zstd.compressed(pieces) if chain.zstd else pieces:
        digest.update(chunk)
        encoded.chunks.append(chunk)
    encoded.checksum = digest.hexdigest()
    return encoded


class _Run:
    """One encoding."""

    def __init__(
        self, chain: Chain, seed: str, base: State, residual: Residual, raw: frozenset[str], frozen: frozenset[str],
        encoded: Encoded,
    ) -> None:  # fmt: skip
        self._chain = chain
        self._seed = seed
        self._base = base
        self._residual = residual
        self._raw, self._frozen = raw, frozen
        self._encoded = encoded

    def pieces(self, name: str, tensor: torch.Tensor) -> Iterator[bytes]:
        """One tensor's bytes."""
        tensor = tensor.detach().to("cpu").resolve_neg().contiguous()
        base = self._base.get(name)
        if base is not None and base.shape != tensor.shape:
            base = None
        (spec,) = specs_of({name: tensor})
        spec.raw = name in self._raw or (name in self._frozen and (base is None or not torch.equal(tensor, base)))
        spec.size = self._chain.size(spec)
        self._encoded.specs.append(spec)
        if self._chain.takes(spec):
            self._base.pop(name, None)  # not needed again
            yield from self._lossy_pieces(name, tensor, base if self._chain.delta else None)
            return
        data = bytes_view(tensor)
        for start in range(0, len(data), CHUNK_BYTES):
            yield bytes(data[start : start + CHUNK_BYTES])

    def _lossy_pieces(self, name: str, tensor: torch.Tensor, base: torch.Tensor | None) -> Iterator[bytes]:
        codec, after = self._chain.codec, self._encoded.residual
        assert codec is not None
        if after is not None:
            after.begin(name, tensor.shape)
        values, flat_base = flat(tensor), None if base is None else flat(base)
        for number, start in enumerate(range(0, len(values), SEGMENT)):
            old = None if flat_base is None else flat_base[start : start + SEGMENT]
            change = difference(values[start : start + SEGMENT], old)
            seed = seed_of(self._seed, name, number)
            if after is None:
                yield codec.encode(change, seed)
                continue
            if (before := self._residual.read(name, tensor.shape, start, len(change))) is not None:
                change += before
            # What the receiver's precision rounds away is for later too, and takes up no place among the largest.
            data = codec.encode(landed(change, old, tensor.dtype), seed)
            # Whoever gets NaN or infinity refuses it, and with it this residual.
            with contextlib.suppress(NonFiniteError):
                change -= landed(codec.decode(memoryview(data), len(change), seed), old, tensor.dtype)
            after.write(name, start, change)
            yield data


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
