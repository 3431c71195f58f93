"""Many peers in one program, forked after the imports, which would otherwise take longer than the benchmark."""

import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .barrier import Barrier, BarrierController

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Peers:
    """A running server and its clients, which wait at the barrier."""

    barrier: BarrierController
    pids: tuple[int, int]


def in_processes(count: int, processes: int, work: Callable[[int], None], barrier: Barrier) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` behind a barrier, in threads of processes; exit with 1 if one fails."""
    children = []
    for process in range(processes):
        if (child := os.fork()) == 0:
            indices = range(process, count, processes)
            barrier.watch(process, indices)
            os._exit(_in_threads(indices, work))
        children.append(child)
    barrier.distribute()
    # Wait for every child, even if others failed.
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(1)


def _in_threads(indices: range, work: Callable[[int], None]) -> int:
    failed = threading.Event()

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException:
            traceback.print_exc()
            failed.set()

    others = [threading.Thread(target=guarded, args=[index], daemon=True) for index in indices[1:]]
    for other in others:
        other.start()
    guarded(indices[0])
    for other in others:
        other.join()
    return int(failed.is_set())


@contextmanager
def program(*command: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of this package, which ends when its standard input ends."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=environment, bufsize=0)  # fmt: skip
    assert process.stdin is not None
    try:
        yield process
        process.stdin.close()
        process.wait(timeout=60)
    finally:
        with suppress(OSError):
            process.stdin.close()
        if process.poll() is None:
            process.kill()
        process.wait()


def family(*roots: int) -> set[int]:
    """Return the processes and all their running descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has just ended
                parents[int(entry.name)] = int(_fields(entry)[1])
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processor_seconds(*roots: int) -> float:
    """Return the processor time of a family of processes so far, in seconds."""
    seconds = 0.0
    for pid in family(*roots):
        with suppress(OSError):
            fields = _fields(Path("/proc", str(pid)))
            seconds += (int(fields[11]) + int(fields[12])) / _TICKS
    return seconds


def _fields(process: Path) -> list[str]:
    """Return the fields of a process's ``stat`` from the third one (its state) on."""
    return (process / "stat").read_text().rpartition(")")[2].split()
