"""Tensors in a file without a header, each at a multiple of 64 bytes."""

import os
from collections.abc import Iterable

import torch

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...tensors import State, dtype_of

_ALIGNMENT = 64


def size_of(specs: Iterable[TensorSpec]) -> int:
    """Return the size in bytes of a file for these tensors."""
    return sum(_aligned(spec.size) for spec in specs)


def reserve(descriptor: int, size: int) -> None:
    """Allocate a file's space. Raise ``OSError`` if the disk has no room.

    Without that, access to a mapped page that the disk has no room for kills the process (SIGBUS, mmap(2)).
    """
    os.posix_fallocate(descriptor, 0, size)


def mapped(path: str, specs: Iterable[TensorSpec], size: int, *, shared: bool) -> State:
    """Return a file's tensors. Changes are written back if they are ``shared``."""
    # Unlike Python's mmap, torch's keeps no descriptor open.
    content = torch.from_file(path, shared=shared, size=size, dtype=torch.uint8)
    tensors, offset = {}, 0
    for spec in specs:
        tensors[spec.name] = content[offset : offset + spec.size].view(dtype_of(spec)).view(tuple(spec.shape))
        offset += _aligned(spec.size)
    return tensors


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
