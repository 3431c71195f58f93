"""Updates that are being received: how many at a time, and the memory that they lie in."""

import asyncio
import logging
import mmap
import os
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import State, dtype_of
from .model import GlobalModel
from .tensorfile import SMALL_BYTES

log = logging.getLogger(__name__)

# Updates being received at the same time take at most about this much memory; the others wait, held back by HTTP/2's
# flow control.
RECEPTION_BYTES = 64 << 20
_MAX_RECEPTIONS = 64
# Who waits longer stands behind somebody slow, and is received into a file.
PATIENCE_SECONDS = 10.0
_ALIGNMENT = 64


class Receptions:
    """A place for each update that is received, with the memory of one that has been folded, if there is any.

    Memory that is used again costs nothing; fresh memory is slower to touch than to fill.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """``directory``: of the files of those that a slow client would keep waiting."""
        self._directory = directory
        self._places: asyncio.Semaphore | None = None
        self._spare: list[State] = []
        self._in_files: set[int] = set()

    @asynccontextmanager
    async def place(self, model: GlobalModel | None) -> AsyncIterator[State]:
        """Waits for a place; yields tensors that nobody needs any more, maybe none.

        A client on a slow link may hold its place for minutes. The others then wait for a while only, and yet cost no
        memory: their tensors lie in a file without a name, whose pages the kernel writes out when it is short of them.
        """
        places = self._semaphore(model)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await places.acquire()
        except TimeoutError:
            room = None if model is None else await asyncio.to_thread(self._file, model.specs)
            if room is not None:
                pointers = {tensor.data_ptr() for tensor in room.values()}
                self._in_files |= pointers
                try:
                    yield room
                finally:
                    self._in_files -= pointers
                return
            await places.acquire()
        try:
            yield self._spare.pop() if self._spare else {}
        finally:
            places.release()

    def give_back(self, tensors: State) -> None:
        """Takes tensors that nobody needs any more."""
        if sum(tensor.nbytes for tensor in tensors.values()) <= SMALL_BYTES:
            return
        if self._in_files.isdisjoint(tensor.data_ptr() for tensor in tensors.values()):
            self._spare.append(tensors)

    def clear(self) -> None:
        """Lets go of the memory: there is little more to be received."""
        self._spare.clear()

    def _semaphore(self, model: GlobalModel | None) -> asyncio.Semaphore:
        if self._places is None:
            if model is None:
                return asyncio.Semaphore(1)  # the initial weights: one client is asked
            self._places = asyncio.Semaphore(max(1, min(_MAX_RECEPTIONS, RECEPTION_BYTES // max(model.size, 1))))
        return self._places

    def _file(self, specs: Iterable[TensorSpec]) -> State | None:
        try:
            return in_file(specs, self._directory)
        except OSError as error:
            log.warning("no file to receive an update into, it waits instead: %s", error.strerror or error)
            return None


def in_file(specs: Iterable[TensorSpec], directory: Path | None) -> State:
    """Tensors in a file that is gone with them. Raises ``OSError`` where there is no room for it.

    The room is made sure of first: to touch a mapped page that the disk has no room for kills the process (SIGBUS,
    mmap(2)).
    """
    offsets, size = [], 0
    specs = [spec for spec in specs if spec.size]
    for spec in specs:
        offsets.append(size)
        size += -(-spec.size // _ALIGNMENT) * _ALIGNMENT
    if not size:
        return {}
    with tempfile.TemporaryFile(dir=directory, prefix="update-") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = mmap.mmap(file.fileno(), size)
    return {
        spec.name: torch.frombuffer(
            mapped, dtype=torch.uint8, count=spec.size, offset=offset
        ).view(dtype_of(spec)).view(tuple(spec.shape))
        for spec, offset in zip(specs, offsets, strict=True)
    }  # fmt: skip
