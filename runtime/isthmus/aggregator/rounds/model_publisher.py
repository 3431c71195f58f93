"""The models that the status names: the newest and the best, each as soon as its file's SHA-256 is known."""

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
# So many times as long as hashing took it rests: it shall not slow quick rounds of a large model down.
_REST = 10


class ModelPublisher:
    """Hashes the files of large models aside, behind everything that a round waits for.

    Where rounds are quick, models in between are passed over.
    """

    def __init__(self, directory: Path, changes: Notifier) -> None:
        """``directory``: what paths in the status are relative to; ``changes`` ring when there is news."""
        self._directory = directory
        self._changes = changes
        self._thread = ThreadPoolExecutor(1, "publish", initializer=_lower_priority)
        self._next: dict[bool, tuple[int, Path]] = {}  # of the best one, and of the newest: round and file
        self._hashing: asyncio.Task[None] | None = None
        self._best: int | None = None  # its round
        self.newest: pb.ModelStatus | None = None
        self.best: pb.ModelStatus | None = None

    def publish(self, checkpoint: Checkpoint) -> None:
        """Take up a committed model."""
        self._take(checkpoint.round, checkpoint.file.path, checkpoint.file.size, best=False)

    def publish_best(self, number: int, path: Path) -> None:
        """Take up the best of the committed models."""
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
        """Take up the final model: nothing comes after it."""
        self._next.clear()
        if self._hashing is not None:
            self._hashing.cancel()
        self.newest = self._status(path, number, sha256)

    def finish_best(self, path: Path, number: int, sha256: str) -> None:
        """Take up the best model beside the final one."""
        self.best = self._status(path, number, sha256)

    def _take(self, number: int, path: Path, size: int, *, best: bool) -> None:
        if size <= SMALL_BYTES:
            with suppress(OSError):  # only the status misses it
                self._show(number, path, sha256_of(path), best=best)
            return
        self._next[best] = number, path
        if self._hashing is None:
            self._hashing = asyncio.create_task(self._hash())

    async def _hash(self) -> None:
        while self._next:
            best = next(iter(self._next))  # the one that waits longest
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
    """Linux takes a thread's id for a process's."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
