"""glibc's arenas with many allocating threads, and reuse of chunks' memory."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# Sixteen live threads allocate; the C library reports its arenas.
ALLOCATE = """
import ctypes, sys, threading
from isthmus.malloc_tuning import tune_malloc

tune_malloc()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.fopen.restype = ctypes.c_void_p
libc.fclose.argtypes, libc.malloc_info.argtypes = [ctypes.c_void_p], [ctypes.c_int, ctypes.c_void_p]
met = threading.Barrier(16)


def allocate():
    met.wait()
    libc.malloc(100_000)
    met.wait()


threads = [threading.Thread(target=allocate) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""

# Four chunks at a time, repeatedly; the kernel counts the page faults.
CHUNKS = """
import resource, sys
from isthmus.malloc_tuning import keep_chunk_memory

sys.argv[1:] and keep_chunk_memory()
for _ in range(100):
    chunks = [b"x" * (1 << 20) for _ in range(4)]
    del chunks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def output(script: str, *arguments: str | Path, **environment: str) -> bytes:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, env=own, timeout=120, stdout=subprocess.PIPE).stdout


def faults(*arguments: str) -> int:
    return int(output(CHUNKS, *arguments))


def arenas(directory: Path, **environment: str) -> int:
    told = directory / "arenas.xml"
    output(ALLOCATE, told, **environment)
    return told.read_text().count("<heap nr=")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
def test_two_arenas_unless_the_user_has_set_a_number(tmp_path: Path) -> None:
    assert arenas(tmp_path) <= 2
    assert arenas(tmp_path, MALLOC_ARENA_MAX="9") == 9


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
def test_chunks_find_the_memory_of_earlier_ones() -> None:
    pages = 100 * 4 * (1 << 20) // resource.getpagesize()
    assert faults() - faults("keep") > pages // 2
