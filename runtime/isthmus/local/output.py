"""Standard stream that may fail during a run: its reader exits, or its disk is full."""

import io
import os
from collections.abc import Callable
from typing import TextIO


class Output(io.TextIOBase):
    """Wrapper of a stream. The first failed write is reported; later output is dropped.

    A run continues without its terminal, since its models and logs are in files. So SIGPIPE, which ends a filter, does
    not end a run.
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
            # Redirect the buffered rest to /dev/null: Python would fail in the same way when it flushes at exit.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._lost(error)
