"""Storage of a round's updates on disk, for rules that need all of them at once."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from ..tensors import State, bytes_view, wide

# Maximum memory for one block of all updates, before the arithmetic on it.
BLOCK_BYTES = 16 << 20


class Spill:
    """File with one row per update, which is read in blocks of the same coordinates of every update.

    The file never has a name, so its space is freed however the process ends. It is read with ``pread`` into blocks of
    bounded size: mapped pages would count as the aggregator's memory.
    """

    def __init__(self, directory: Path | None, model: State) -> None:
        self._directory = directory
        self._model = model
        self._offsets: dict[str, int] = {}
        self._row = 0
        for name, tensor in model.items():
            self._offsets[name] = self._row
            self._row += tensor.numel() * tensor.element_size()
        self._file: IO[bytes] | None = None
        self._clients: list[str] = []

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, client: str, tensors: State) -> None:
        """Write one update. If it raises ``OSError`` the update is not stored, and may be added again."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, prefix="updates-")  # noqa: SIM115 - until close()
        row = len(self._clients) * self._row
        for name, offset in self._offsets.items():
            data = bytes_view(tensors[name].contiguous())
            position = row + offset
            while data:
                written = os.pwrite(self._file.fileno(), data, position)
                data, position = data[written:], position + written
        self._clients.append(client)

    def rows(self) -> list[int]:
        """Return the rows in the order of the clients' names, so that results do not depend on the order of arrival."""
        return sorted(range(len(self._clients)), key=self._clients.__getitem__)

    def width(self, rows: int) -> int:
        """Return the number of coordinates in a block of this number of rows."""
        return max(1, BLOCK_BYTES // (8 * rows))

    def read(self, name: str, start: int, count: int, rows: Sequence[int]) -> torch.Tensor:
        """Return ``count`` coordinates of a tensor, from ``start``, for the given rows: shape (rows, count).

        Floating-point numbers are returned in the precision of sums, integers and booleans as int64.
        """
        dtype = self._model[name].dtype
        return self._raw(name, start, count, rows).to(wide(dtype) if dtype.is_floating_point else torch.int64)

    def _raw(self, name: str, start: int, count: int, rows: Sequence[int]) -> torch.Tensor:
        assert self._file is not None
        dtype = self._model[name].dtype
        raw = torch.empty((len(rows), count), dtype=dtype, device="cpu")
        for target, row in zip(raw, rows, strict=True):
            view = bytes_view(target)
            position = row * self._row + self._offsets[name] + start * dtype.itemsize
            while view:
                got = os.preadv(self._file.fileno(), [view], position)
                if got == 0:
                    raise OSError("the file of the round's updates has been truncated")
                view, position = view[got:], position + got
        return raw

    def update(self, row: int) -> State:
        """Return all tensors of one update, as they were written."""
        return {
            name: self._raw(name, 0, tensor.numel(), [row]).view(tensor.shape) for name, tensor in self._model.items()
        }

    def close(self) -> None:
        """Close the file, which frees its space."""
        if self._file is not None:
            self._file.close()
            self._file = None
