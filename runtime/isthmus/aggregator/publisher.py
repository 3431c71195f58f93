"""Which model the status tells of: the newest committed one, as soon as its file's SHA-256 is known."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from isthmus_contracts.pb import federation_pb2 as pb

from .bell import Bell
from .checkpoints import Checkpoint
from .tensorfile import SMALL_BYTES, sha256_of

_NICENESS = 10
# So many times as long as hashing took it rests: it shall not slow quick rounds of a large model down.
_REST = 10


class Publisher:
    """Hashes the files of large models aside, behind everything that a round waits for.

    Where rounds are quick, models in between are passed over.
    """

    def __init__(self, directory: Path, changes: Bell) -> None:
        """``directory``: what paths in the status are relative to; ``changes`` ring when there is news."""
        self._directory = directory
        self._changes = changes
        self._thread = ThreadPoolExecutor(1, "publish", initializer=_step_back)
        self._next: Checkpoint | None = None
        self._hashing: asyncio.Task[None] | None = None
        self.newest: pb.ModelStatus | None = None

    def publish(self, checkpoint: Checkpoint) -> None:
        """Takes up a committed model."""
        if checkpoint.file.size <= SMALL_BYTES:
            with suppress(OSError):  # only the status misses it
                self._show(checkpoint, sha256_of(checkpoint.file.path))
            return
        self._next = checkpoint
        if self._hashing is None:
            self._hashing = asyncio.create_task(self._hash())

    def finish(self, path: Path, number: int, sha256: str) -> None:
        """The final model is there: nothing comes after it."""
        self._next = None
        if self._hashing is not None:
            self._hashing.cancel()
        self.newest = pb.ModelStatus(path=path.name, round=number, sha256=sha256)

    async def _hash(self) -> None:
        while (checkpoint := self._next) is not None:
            self._next = None
            started = time.monotonic()
            with suppress(OSError):  # it was retired meanwhile; a newer one follows
                sha256 = await asyncio.get_running_loop().run_in_executor(self._thread, sha256_of, checkpoint.file.path)
                self._show(checkpoint, sha256)
            await asyncio.sleep(_REST * (time.monotonic() - started))
        self._hashing = None

    def _show(self, checkpoint: Checkpoint, sha256: str) -> None:
        path = checkpoint.file.path.relative_to(self._directory)
        self.newest = pb.ModelStatus(path=str(path), round=checkpoint.round, sha256=sha256)
        self._changes.tell()


def _step_back() -> None:
    """Linux takes a thread's id for a process's."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
