"""Encoding of state dicts with a chain of codecs."""

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
    """Encoded state dict: the specs for its header, and its data, which may be sent any number of times."""

    chain: Chain
    specs: list[TensorSpec] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    checksum: str = ""
    residual: Residual | None = None
    """Values that a sparse chain left out. The sender adds them to its next update, once this one is accepted."""

    @property
    def size(self) -> int:
        """Size of the data in bytes."""
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
    """Encode tensors one by one, on any device. Raises :class:`TransferError` for values that cannot be sent.

    ``base`` is the model from which a Delta is computed, ``residual`` holds the values that earlier updates left out,
    and ``seed`` identifies the round and the sender. Without ``keep_base`` each tensor of the base is released after
    use, so that the new residual of a sparse chain and the whole base are never in memory together.

    Lossy codecs and error feedback suit changes that add up, such as steps of gradient descent. The statistics of a
    batch-norm layer, for example, are not a sum of changes: half a change may make a variance negative, and a change
    that is sent later is applied twice. So tensors named in ``raw`` bypass the lossy codecs, as do tensors named in
    ``frozen`` (which have no gradient) that nevertheless differ from the base.
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
    """State of one call of :func:`encode`."""

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
        """Yield one tensor's bytes."""
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
            # Values that the receiver's precision rounds away stay in the residual, so TopK does not select them.
            data = codec.encode(landed(change, old, tensor.dtype), seed)
            # The receiver refuses NaN and infinity, so this residual will not be used.
            with contextlib.suppress(NonFiniteError):
                change -= landed(codec.decode(memoryview(data), len(change), seed), old, tensor.dtype)
            after.write(name, start, change)
            yield data


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join small pieces to chunks of at most the maximum size."""
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
