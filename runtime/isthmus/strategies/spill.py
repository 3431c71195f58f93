"""The updates of a round, kept on disk for rules that need all of them at once."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from ..tensors import State, bytes_view
from .base import wide

# What one block of all updates takes in memory, at most, before the arithmetic on it.
BLOCK_BYTES = 16 << 20


class Spill:
    """A file with one row per update, read back block by block: the same coordinates of every update.

    The file has no name from the beginning, so that however the process ends its space is given back. It is read with
    ``pread`` into a block of bounded size: mapped pages would count as the aggregator's own memory.
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
        """Writes one update. Raises ``OSError``; then the update is not there, and may be tried again."""
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
        """The rows in the order of the clients' names: results do not depend on who came first."""
        return sorted(range(len(self._clients)), key=self._clients.__getitem__)

    def width(self, rows: int) -> int:
        """Return how many coordinates of so many rows make a block."""
        return max(1, BLOCK_BYTES // (8 * rows))

    def read(self, name: str, start: int, count: int, rows: Sequence[int]) -> torch.Tensor:
        """``count`` coordinates of a tensor from ``start`` on, of the given rows: a row of the result for each.

        Floating-point numbers come in the precision of sums, integers and booleans as int64.
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
                    raise OSError("the file of the round's updates is shorter than it was written")
                view, position = view[got:], position + got
        return raw

    def update(self, row: int) -> State:
        """All tensors of one update, as they were written."""
        return {
            name: self._raw(name, 0, tensor.numel(), [row]).view(tensor.shape) for name, tensor in self._model.items()
        }

    def close(self) -> None:
        """Gives the file's space back."""
        if self._file is not None:
            self._file.close()
            self._file = None
