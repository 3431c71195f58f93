"""Newest and best model in the status, each shown once its file's SHA-256 is known."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from isthmus_contracts.pb import federation_pb2 as pb

from ..state.notifier import Notifier
from ..storage.checkpoints import Checkpoint
from ..storage.safetensors_file import SMALL_BYTES, sha256_of

_NICENESS = 10
# Pause after each hash, as a multiple of the time that it took, so that quick rounds of a large model are not slowed.
_REST = 10


class ModelPublisher:
    """Publisher that hashes the files of large models in a thread of low priority.

    If rounds are quick, intermediate models are skipped.
    """

    def __init__(self, directory: Path, changes: Notifier) -> None:
        """``directory``: base of the paths in the status. ``changes``: notified when a model is shown."""
        self._directory = directory
        self._changes = changes
        self._thread = ThreadPoolExecutor(1, "publish", initializer=_lower_priority)
        self._next: dict[bool, tuple[int, Path]] = {}  # by whether it is the best: round and file
        self._hashing: asyncio.Task[None] | None = None
        self._best: int | None = None  # its round
        self.newest: pb.ModelStatus | None = None
        self.best: pb.ModelStatus | None = None

    def publish(self, checkpoint: Checkpoint) -> None:
        """Schedule a newly committed model for publication."""
        self._take(checkpoint.round, checkpoint.file.path, checkpoint.file.size, best=False)

    def publish_best(self, number: int, path: Path) -> None:
        """Schedule the best committed model for publication."""
        if number == self._best:
            return
        self._best = number
        if self.newest is not None and self.newest.round == number:
            self.best = self.newest
            self._changes.notify_listeners()
            return
        with suppress(OSError):
            self._take(number, path, path.stat().st_size, best=True)

    def finish(self, path: Path, number: int, sha256: str) -> None:
        """Publish the final model, and cancel everything that is scheduled."""
        self._next.clear()
        if self._hashing is not None:
            self._hashing.cancel()
        self.newest = self._status(path, number, sha256)

    def finish_best(self, path: Path, number: int, sha256: str) -> None:
        """Publish the copy of the best model beside the final one."""
        self.best = self._status(path, number, sha256)

    def _take(self, number: int, path: Path, size: int, *, best: bool) -> None:
        if size <= SMALL_BYTES:
            with suppress(OSError):  # the model is then missing in the status only
                self._show(number, path, sha256_of(path), best=best)
            return
        self._next[best] = number, path
        if self._hashing is None:
            self._hashing = asyncio.create_task(self._hash())

    async def _hash(self) -> None:
        while self._next:
            best = next(iter(self._next))  # the oldest entry
            number, path = self._next.pop(best)
            started = time.monotonic()
            with suppress(OSError):  # it was retired meanwhile; a newer one follows
                sha256 = await asyncio.get_running_loop().run_in_executor(self._thread, sha256_of, path)
                self._show(number, path, sha256, best=best)
            await asyncio.sleep(_REST * (time.monotonic() - started))
        self._hashing = None

    def _show(self, number: int, path: Path, sha256: str, *, best: bool) -> None:
        status = self._status(path, number, sha256)
        if not best:
            self.newest = status
        if number == self._best:
            self.best = status
        self._changes.notify_listeners()

    def _status(self, path: Path, number: int, sha256: str) -> pb.ModelStatus:
        return pb.ModelStatus(path=str(path.relative_to(self._directory)), round=number, sha256=sha256)


def _lower_priority() -> None:
    """Lower the priority of this thread. Linux accepts a thread's id in place of a process's."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
