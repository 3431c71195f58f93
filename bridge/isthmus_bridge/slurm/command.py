"""Execution of a program with a time limit and bounded output, without a shell."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 65536


class CommandTimeout(Exception):
    """The program did not end in time, and was killed together with its process group."""

    def __init__(self, message: str, errors: str = "") -> None:
        """``errors``: its output on standard error so far."""
        super().__init__(message)
        self.errors = errors


class CommandOutputTooLong(Exception):
    """The program wrote more than allowed, and was killed."""


@dataclass(frozen=True)
class Result:
    """Exit status and output of a program."""

    status: int
    output: str
    errors: str


Runner = Callable[..., Result]


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout: float,
    max_output: int = 1 << 20,
    inherit: Sequence[int] = (),
    directory: Path | None = None,
    content: bytes = b"",
) -> Result:
    """Run ``argv``. Raises ``OSError``, :class:`CommandTimeout` and :class:`CommandOutputTooLong`.

    ``timeout``: seconds. ``max_output``: bytes; of standard error only the first 64 KiB are kept. ``inherit``: file
    descriptors that the program inherits. ``content``: the program's standard input.
    """
    process = subprocess.Popen(
        list(argv),
        env=dict(env),
        stdin=subprocess.PIPE if content else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=directory,
        # A process group of its own, so that a time-out kills the children of wrappers too.
        start_new_session=True,
        pass_fds=tuple(inherit),
    )
    try:
        output, errors = _collect(process, time.monotonic() + timeout, max_output, argv[0], content)
        return Result(process.returncode, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace"))
    except BaseException:
        # A program that runs as another user cannot be killed: it ends by its own time limit, and is reaped later.
        # Do not signal a reaped process: its pid may have been reused.
        if process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        raise
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                # Unwritten input is dropped.
                with suppress(BrokenPipeError):
                    stream.close()


def _collect(
    process: subprocess.Popen[bytes], deadline: float, limit: int, name: str, content: bytes
) -> tuple[bytes, bytes]:
    assert process.stdout is not None and process.stderr is not None
    taken: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    out = process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        for descriptor in taken:
            selector.register(descriptor, selectors.EVENT_READ)
        left_to_write = memoryview(content)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise CommandTimeout(f"{name} did not answer in time", _words(taken, out))
            # A program may end while one of its children holds the output open.
            ready = selector.select(min(left, 0.5))
            if not ready and process.poll() is not None:
                break
            for key, event in ready:
                if event & selectors.EVENT_WRITE:
                    assert process.stdin is not None
                    left_to_write = _written(key.fd, left_to_write)
                    if not left_to_write:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    selector.unregister(key.fd)
                elif key.fd != out:
                    taken[key.fd] += chunk[: max(0, _CHUNK - len(taken[key.fd]))]
                else:
                    taken[out] += chunk
                    if len(taken[out]) > limit:
                        raise CommandOutputTooLong(f"{name} wrote more than {limit} bytes")
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise CommandTimeout(f"{name} did not end in time", _words(taken, out)) from None
    return bytes(taken[out]), bytes(taken[process.stderr.fileno()])


def _words(taken: Mapping[int, bytearray], out: int) -> str:
    return b"".join(bytes(data) for descriptor, data in taken.items() if descriptor != out).decode("utf-8", "replace")


def _written(descriptor: int, content: memoryview) -> memoryview:
    """Write as much as fits, and return the rest; an empty rest if the program no longer reads."""
    try:
        return content[os.write(descriptor, content[:_CHUNK]) :]
    except BlockingIOError:
        return content
    except BrokenPipeError:
        return content[:0]
