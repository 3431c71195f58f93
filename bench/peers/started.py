"""Programs that end with the benchmark, including their child processes."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_GRACE_SECONDS = 10.0


@contextmanager
def started(*command: str | Path, log: Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a new session."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environ,
                                   cwd=log.parent, start_new_session=True)  # fmt: skip
    try:
        yield process
    finally:
        # Do not signal a reaped process: its number may belong to another group.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            until = time.monotonic() + _GRACE_SECONDS
            while not _ended(process.pid) and time.monotonic() < until:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ended(child: int) -> bool:
    """Return True if a child has ended. It is not reaped yet, so that the number of its group stays reserved."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def free_port() -> int:
    """Return a port without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def await_port(port: int, process: subprocess.Popen[bytes], seconds: float = 180.0) -> None:
    """Wait until a program listens. Raises ``RuntimeError``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.2)
    raise RuntimeError(f"nothing listens on port {port}")
