"""External observation of another framework's rounds."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

_SAMPLE_SECONDS = 0.25


@dataclass
class Observed:
    """Seconds of each round except the first (start-up), and the server's peak memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    server_peak: int = 0


def rounds_of(times: Path) -> list[float]:
    """Return the durations between the times in a file, without the first one. Raises ``RuntimeError`` for too few."""
    steps = [later - earlier for earlier, later in pairwise(map(float, times.read_text().split()))]
    if len(steps) < 2:
        raise RuntimeError("it did not get through its rounds")
    return steps[1:]


@contextmanager
def memory_of(processes: Callable[[], set[int]], observed: Observed) -> Iterator[None]:
    """Sample the sum of the processes' resident sets a few times a second during the block, and record the largest."""
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            observed.server_peak = max(observed.server_peak, sum(map(resident, processes())))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def resident(pid: int) -> int:
    """Return the resident set of a process in bytes, or 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def mentioning(*texts: str) -> set[int]:
    """Return the processes whose command lines contain all of these words."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has just ended
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(text in command for text in texts):
                    found.add(int(entry.name))
    return found
