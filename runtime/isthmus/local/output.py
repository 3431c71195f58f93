"""A standard stream that a run may outlive: its reader goes away, or the disk that it goes to fills up."""

import io
import os
from collections.abc import Callable
from typing import TextIO


class Output(io.TextIOBase):
    """Writes through to a stream; a write that fails is reported once, and what comes later is dropped.

    A run that nobody watches any more trains on: its models and its logs are in files. So SIGPIPE, which would end a
    filter, does not end a run.
    """

    def __init__(self, stream: TextIO, lost: Callable[[OSError], None]) -> None:
        """``lost`` is called with the error that ended the output."""
        self._stream = stream
        self._lost = lost
        self._works = True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str, /) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, work: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            work()
        except OSError as error:
            self._works = False
            # What the stream still holds goes nowhere, or Python would fail in the same way when it flushes it at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._lost(error)
