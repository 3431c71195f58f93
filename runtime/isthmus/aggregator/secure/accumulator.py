"""Sum of masked updates as a file that is mapped into memory, so that it survives the end of its process."""

import os
from collections.abc import Sequence
from pathlib import Path

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...tensors import State
from ..storage.tensor_space import mapped, reserve, size_of


class AccumulatorFile:
    """File that holds the tensors of one sum, one behind the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._specs: list[TensorSpec] = []
        self._shared: State = {}

    def allocate(self, specs: Sequence[TensorSpec]) -> State:
        """Return tensors of any values that are backed by the file. Raise ``OSError`` if the disk has no room."""
        if list(specs) != self._specs:
            self._shared, self._specs = {}, []
            # A file that is still mapped keeps its content: it is replaced and not truncated.
            self._path.unlink(missing_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                reserve(descriptor, _size(specs))
            finally:
                os.close(descriptor)
            self._specs = list(specs)
        self._shared = self._shared or self._map(specs, shared=True)
        return dict(self._shared)

    def private(self, specs: Sequence[TensorSpec]) -> State:
        """Return the file's tensors in memory whose changes are not written back (MAP_PRIVATE, mmap(2)).

        Each page is copied when it is first changed. The tensors of :meth:`allocate` are not kept here any longer, so
        that the sum is in memory once. Raises ``OSError`` if there is no file of that size.
        """
        self._shared = {}
        size = self._path.stat().st_size
        if size != _size(specs):
            raise OSError(f"{self._path} has {size} bytes, not {_size(specs)}")
        return self._map(specs, shared=False)

    def remove(self) -> None:
        """Remove the file, if there is one. Raise ``OSError``."""
        self._shared, self._specs = {}, []
        self._path.unlink(missing_ok=True)

    def _map(self, specs: Sequence[TensorSpec], *, shared: bool) -> State:
        return mapped(str(self._path), specs, _size(specs), shared=shared)


def _size(specs: Sequence[TensorSpec]) -> int:
    return max(size_of(specs), 1)  # a file of no bytes cannot be mapped
