"""Masks made by seeking in counter mode: the reference for those that are made of whole segments."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from isthmus.secure_aggregation.primitives.masks import (
    _AES_BYTES,
    SEGMENT_BYTES,
    Integers,
    MaskError,
    Size,
    _add,
    _checked,
    _flat,
    _parts,
)  # fmt: skip

_FIRST_COUNTER = 2


class Block(NamedTuple):
    """Elements ``start`` to ``stop`` of a flattened tensor."""

    name: str
    start: int
    stop: int


class MaskStream:
    """Mask of one key for the tensors of a vector."""

    def __init__(self, key: bytes, sizes: Mapping[str, Size]) -> None:
        """``key`` has 32 bytes and serves no other vector. Raises ``MaskError`` for tensors that are not integers."""
        self._key = _checked(key)
        self._parts = {part.name: part for part in _parts(sizes)}

    def add_to(self, state: Mapping[str, torch.Tensor], sign: int, blocks: Iterable[Block] | None = None) -> None:
        """Add the mask to tensors, or subtract it if ``sign`` is -1; to ``blocks`` only, if they are given."""
        if blocks is None:
            blocks = [Block(name, 0, tensor.numel()) for name, tensor in state.items()]
        for block in blocks:
            target = _flat(block.name, state[block.name], self._parts[block.name])
            step = SEGMENT_BYTES // target.itemsize
            for start in range(block.start, block.stop, step):
                stop = min(start + step, block.stop)
                _add(target[start:stop], self.values(block.name, start, stop), sign)

    def values(self, name: str, start: int, stop: int) -> Integers:
        """Return the mask of elements ``start`` to ``stop`` of a tensor, as integers of the tensor's type."""
        part = self._parts[name]
        size = part.dtype.itemsize
        if not 0 <= start <= stop <= (part.stop - part.start) // size:
            raise MaskError(f"{name}: elements {start} to {stop} are not all in the tensor")
        output = _keystream(self._key, part.start + start * size, (stop - start) * size)
        return np.frombuffer(output, part.dtype)


def _keystream(key: bytes, start: int, length: int) -> bytes:
    """Return bytes of the stream from any place on."""
    pieces = []
    stop = start + length
    while start < stop:
        number, inside = divmod(start, SEGMENT_BYTES)
        end = min(stop - number * SEGMENT_BYTES, SEGMENT_BYTES)
        block, skip = divmod(inside, _AES_BYTES)
        counter = number.to_bytes(12, "big") + (_FIRST_COUNTER + block).to_bytes(4, "big")
        pieces.append(counter_mode(key, counter, end - inside + skip)[skip:])
        start = number * SEGMENT_BYTES + end
    return b"".join(pieces)


def counter_mode(key: bytes, counter: bytes, length: int) -> bytes:
    """Return the keystream of AES in counter mode from a first counter block of 16 bytes on."""
    return Cipher(AES(key), CTR(counter)).encryptor().update(bytes(length))
