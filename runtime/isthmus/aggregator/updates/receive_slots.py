"""Limits on concurrently received updates, and the memory that they are received into."""

import asyncio
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...tensors import State
from ..model.global_model import GlobalModel
from ..storage.safetensors_file import SMALL_BYTES
from ..storage.tensor_space import mapped, reserve, size_of

log = logging.getLogger(__name__)

# Approximate bound of the memory for updates that are received concurrently, in bytes. Other updates wait, held back by
# HTTP/2's flow control.
RECEPTION_BYTES = 24 << 20
# Bytes of the next update that are read before it has a slot.
AHEAD_BYTES = 32 << 20
_MAX_RECEPTIONS = 64
# Lower bound of the speed at which updates are received over good links, one after the other. A client that waits for
# longer is behind slow links: its update is received in parallel, into a file.
SECONDS_OF_EACH, BYTES_PER_SECOND = 0.05, 50e6
GRACE_SECONDS = 1.0
# Number of models for which files must leave room on the disk: checkpoints have priority.
_MODELS_LEFT_FREE = 4


@dataclass(frozen=True)
class _Limits:
    turns: asyncio.Semaphore
    places: asyncio.Semaphore

    @classmethod
    def of(cls, places: int) -> "_Limits":
        return cls(asyncio.Semaphore(places + 1), asyncio.Semaphore(places))


class ReceiveSlots:
    """Slots for the reception of updates, each with the memory of an update that has been folded, if there is any.

    Fresh memory would be slower: its page faults take longer than the copy.
    """

    def __init__(
        self, directory: Path | None = None,
        specs: Callable[[GlobalModel], Sequence[TensorSpec]] = lambda model: model.specs,
    ) -> None:  # fmt: skip
        """``directory``: where to receive updates that would otherwise wait for a slow client. ``specs``: returns the
        specs of updates from a model."""
        self._directory = directory
        self._specs = specs
        self._limits: _Limits | None = None
        self._spare: list[State] = []
        self._in_files: set[int] = set()
        self._waiting = 0
        self._moved = 0.0
        """Time at which a ticket or slot was last released (the loop's time)."""

    @asynccontextmanager
    async def ticket(self, model: GlobalModel | None) -> AsyncIterator[State | None]:
        """Wait until one more client may send.

        There is one ticket more than there are slots, so that the next update is sent while one is being folded.

        A client on a slow link may take minutes. Others then wait only for a limited time, and get tensors that occupy
        no memory: they are mapped from an unnamed file, whose pages the kernel writes to disk when memory is short. If
        ``None`` is yielded, call :meth:`slot` to wait for memory.
        """
        turns = self._limits_for(model).turns
        async with self._admitted(turns, model) as room:
            yield room

    @asynccontextmanager
    async def slot(self, model: GlobalModel | None) -> AsyncIterator[State]:
        """Wait for a slot, in the same way; yield tensors whose memory may be reused, possibly none."""
        places = self._limits_for(model).places
        async with self._admitted(places, model) as room:
            yield room if room is not None else self._spare.pop() if self._spare else {}

    @asynccontextmanager
    async def _admitted(self, semaphore: asyncio.Semaphore, model: GlobalModel | None) -> AsyncIterator[State | None]:
        """Wait for the semaphore and yield ``None``, or yield a file's tensors if slow links block the queue."""
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
        """Wait for the semaphore, but not behind slow links; return whether it was acquired.

        The wait is limited by the expected time for the whole queue, and by that for one update if the queue stops.
        """
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
        """Take back tensors that are no longer needed."""
        if sum(tensor.nbytes for tensor in tensors.values()) <= SMALL_BYTES:
            return
        if self._in_files.isdisjoint(tensor.data_ptr() for tensor in tensors.values()):
            self._spare.append(tensors)

    def clear(self) -> None:
        """Release the memory, after the last round."""
        self._spare.clear()

    def _limits_for(self, model: GlobalModel | None) -> "_Limits":
        if model is None:
            return _Limits.of(1)  # initial weights: one client at a time is asked
        if self._limits is None:
            self._limits = _Limits.of(max(1, min(_MAX_RECEPTIONS, RECEPTION_BYTES // max(model.size, 1))))
        return self._limits

    def _file(self, model: GlobalModel) -> State | None:
        try:
            if shutil.disk_usage(self._directory or tempfile.gettempdir()).free < (1 + _MODELS_LEFT_FREE) * model.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return in_file(self._specs(model), self._directory)
        except OSError as error:
            log.warning("no file to receive an update into, so it waits: %s", error.strerror or error)
            return None


def in_file(specs: Iterable[TensorSpec], directory: Path | None) -> State:
    """Return tensors in an unnamed file, which disappears with them. Raise ``OSError`` if the disk has no room."""
    specs = [spec for spec in specs if spec.size]
    if not (size := size_of(specs)):
        return {}
    with tempfile.TemporaryFile(dir=directory, prefix="update-") as file:
        reserve(file.fileno(), size)
        return mapped(f"/proc/self/fd/{file.fileno()}", specs, size, shared=True)
