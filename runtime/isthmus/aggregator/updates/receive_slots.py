"""Updates that are being received: how many at a time, and the memory that they lie in."""

import asyncio
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...tensors import State, dtype_of
from ..model.global_model import GlobalModel
from ..storage.safetensors_file import SMALL_BYTES

log = logging.getLogger(__name__)

# Updates being received at the same time take at most about this much memory; the others wait, held back by HTTP/2's
# flow control.
RECEPTION_BYTES = 24 << 20
# Of the one that comes next so much is read before it has a place.
AHEAD_BYTES = 32 << 20
_MAX_RECEPTIONS = 64
# So quickly an aggregator takes in the updates of clients on good links, one after the other, however busy it is. Who
# is kept waiting for longer stands behind slow links, and is received beside them, into a file.
SECONDS_OF_EACH, BYTES_PER_SECOND = 0.05, 50e6
GRACE_SECONDS = 1.0
# Files leave room on the disk for so many models: the checkpoints matter more.
_MODELS_LEFT_FREE = 4
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Limits:
    turns: asyncio.Semaphore
    places: asyncio.Semaphore

    @classmethod
    def of(cls, places: int) -> "_Limits":
        return cls(asyncio.Semaphore(places + 1), asyncio.Semaphore(places))


class ReceiveSlots:
    """A place for each update that is received, with the memory of one that has been folded, if there is any.

    Memory that is used again costs nothing; fresh memory is slower to touch than to fill.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """``directory``: of the files of those that a slow client would keep waiting."""
        self._directory = directory
        self._limits: _Limits | None = None
        self._spare: list[State] = []
        self._in_files: set[int] = set()
        self._waiting = 0
        self._moved = 0.0
        """When a turn or a place was last given back (the loop's time)."""

    @asynccontextmanager
    async def ticket(self, model: GlobalModel | None) -> AsyncIterator[State | None]:
        """Waits until one more client may send. There is one turn more than there are places: an update shall be on its
        way while the one before it is being folded.

        A client on a slow link may take minutes. The others then wait for a while only, and are yielded tensors that
        cost no memory: they lie in a file without a name, whose pages the kernel writes out when it is short of them.
        Who is yielded none asks for a :meth:`place`.
        """
        turns = self._limits_for(model).turns
        async with self._admitted(turns, model) as room:
            yield room

    @asynccontextmanager
    async def slot(self, model: GlobalModel | None) -> AsyncIterator[State]:
        """Waits for a place, likewise; yields tensors that nobody needs any more, maybe none."""
        places = self._limits_for(model).places
        async with self._admitted(places, model) as room:
            yield room if room is not None else self._spare.pop() if self._spare else {}

    @asynccontextmanager
    async def _admitted(self, semaphore: asyncio.Semaphore, model: GlobalModel | None) -> AsyncIterator[State | None]:
        """Waits for the semaphore, but not behind slow links, if there is room for a file: its tensors are yielded."""
        if not await self._acquired(semaphore, model):
            room = None if model is None else await asyncio.to_thread(self._file, model)
            if room is not None:
                pointers = {tensor.data_ptr() for tensor in room.values()}
                self._in_files |= pointers
                try:
                    yield room
                finally:
                    self._in_files -= pointers
                return
            await semaphore.acquire()
        try:
            yield None
        finally:
            self._moved = asyncio.get_running_loop().time()
            semaphore.release()

    async def _acquired(self, semaphore: asyncio.Semaphore, model: GlobalModel | None) -> bool:
        """Waits for it, but not behind slow links: for as long as the queue takes where it moves, and for one update's
        time where it stands still, however long it is."""
        if not semaphore.locked():
            return await semaphore.acquire()
        each = SECONDS_OF_EACH + (0 if model is None else model.size) / BYTES_PER_SECOND
        loop = asyncio.get_running_loop()
        came = loop.time()
        self._waiting += 1
        latest = came + GRACE_SECONDS + self._waiting * each
        waiting = asyncio.ensure_future(semaphore.acquire())
        try:
            while not waiting.done():
                until = min(latest, max(came, self._moved) + GRACE_SECONDS + each)
                if until <= loop.time():
                    break
                await asyncio.wait((waiting,), timeout=until - loop.time())
            return waiting.done()
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                semaphore.release()
            raise
        finally:
            self._waiting -= 1
            waiting.cancel()

    def give_back(self, tensors: State) -> None:
        """Takes tensors that nobody needs any more."""
        if sum(tensor.nbytes for tensor in tensors.values()) <= SMALL_BYTES:
            return
        if self._in_files.isdisjoint(tensor.data_ptr() for tensor in tensors.values()):
            self._spare.append(tensors)

    def clear(self) -> None:
        """Lets go of the memory: there is little more to be received."""
        self._spare.clear()

    def _limits_for(self, model: GlobalModel | None) -> "_Limits":
        if model is None:
            return _Limits.of(1)  # the initial weights: one client is asked
        if self._limits is None:
            self._limits = _Limits.of(max(1, min(_MAX_RECEPTIONS, RECEPTION_BYTES // max(model.size, 1))))
        return self._limits

    def _file(self, model: GlobalModel) -> State | None:
        try:
            if shutil.disk_usage(self._directory or tempfile.gettempdir()).free < (1 + _MODELS_LEFT_FREE) * model.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return in_file(model.specs, self._directory)
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
        # Unlike a map of Python's, one of torch's keeps no descriptor open.
        content = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=size, dtype=torch.uint8)
    return {
        spec.name: content[offset : offset + spec.size].view(dtype_of(spec)).view(tuple(spec.shape))
        for spec, offset in zip(specs, offsets, strict=True)
    }
