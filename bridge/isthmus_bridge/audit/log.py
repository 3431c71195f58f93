"""The file of the audit log. The bridge appends to it and never changes or removes a line."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus_contracts.process.files import sync_directory

from .chain import GENESIS, TORN, Head, hash_of, parse, record_line

log = logging.getLogger(__name__)

# More than two of the longest lines.
_TAIL_BYTES = 1 << 17

Record = tuple[str, Mapping[str, Any]]


class AuditLog:
    """Writer of the log, which only one process has. Thread-safe. Lines are durable when a method returns."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open the file, or create it with mode 0600. Raises ``OSError``."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._descriptor = -1
        self._file: tuple[int, int] | None = None
        self._head = Head()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock:
            self._open()

    @property
    def head(self) -> Head:
        """The last line's number and hash."""
        return self._head

    def append(self, event: str, **fields: Any) -> None:
        """Append a record. Raises ``OSError``."""
        self.extend([(event, fields)])

    def extend(self, records: Sequence[Record]) -> None:
        """Append several records. Raises ``OSError``."""
        if not records:
            return
        with self._lock:
            if self._descriptor < 0 or self._identity() != self._file:
                # An earlier line is incomplete, or the file was removed or replaced.
                self._open()
            try:
                self._write(records)
            except OSError:
                self._forget()
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._forget()

    def _write(self, records: Sequence[Record], start: bytes = b"") -> None:
        head, text = self._head, bytearray(start)
        for event, fields in records:
            line, head = record_line(head, self._clock(), event, fields)
            text += line + b"\n"
        view = memoryview(text)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)
        self._head = head

    def _open(self) -> None:
        """Open the file and find its end. A file that was removed is created again; its first line shows the gap."""
        self._forget()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        try:
            os.fchmod(self._descriptor, 0o600)
            self._file = self._identity()
            size = os.fstat(self._descriptor).st_size
            if not size:
                if self._head.hash != GENESIS:
                    log.error("the audit log %s was removed; it goes on in a new file", self._path)
                sync_directory(self._path.parent)
                return
            tail = os.pread(self._descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
            self._resume(tail)
        except OSError:
            self._forget()
            raise

    def _resume(self, tail: bytes) -> None:
        ended = tail.endswith(b"\n")
        lines = tail.removesuffix(b"\n").split(b"\n")
        number = next((found["n"] for line in reversed(lines) if (found := parse(line)) is not None), 0)
        self._head = Head(number, hash_of(lines[-1]))
        torn = parse(lines[-1]) is None
        if torn:
            log.error("the last line of the audit log %s is incomplete", self._path)
        if torn or not ended:
            self._write([(TORN, {})] if torn else [], b"" if ended else b"\n")

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
