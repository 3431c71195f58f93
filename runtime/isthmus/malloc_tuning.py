"""Tuning of glibc's malloc: how much freed memory it keeps.

It should keep enough that the chunks of streams reuse mapped memory, and so little that memory use stays flat over
thousands of rounds.
"""

import os

import torch

from .libc import libc_function

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# gRPC's threads are short-lived, and one frees memory that another has allocated. With an arena for each, which is the
# default, fragmentation exceeds 100 MB within a hundred rounds. Two arenas are as fast as eight per core.
_ARENAS = 2
# Chunks of streams, of at most 1 MiB, are reused all the time. Larger blocks, and memory beyond this, are released.
_KEPT_BYTES = 4 << 20


def tune_malloc() -> None:
    """Tune malloc in a process of Isthmus; must be called before threads are started.

    Does nothing if ``MALLOC_ARENA_MAX`` is set, or without glibc.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    if (mallopt := libc_function("mallopt")) is None:
        return
    for parameter, value in (
        (_M_ARENA_MAX, _ARENAS),
        (_M_MMAP_THRESHOLD, _KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
    ):
        mallopt(parameter, value)


def release_free_memory() -> None:
    """Return all free memory to the system. Slow: not for the event loop. Source: malloc_trim(3)."""
    if (malloc_trim := libc_function("malloc_trim")) is not None:
        malloc_trim(0)


def keep_chunk_memory() -> None:
    """Tune malloc in the user's own process, without overriding the user's settings.

    glibc keeps twice the size of the largest block that was freed, up to 64 MB, so freeing one of a few megabytes is
    enough. Without it every chunk is read into fresh pages, which costs more than copying it. Source: mallopt(3),
    ``M_MMAP_THRESHOLD``.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8, device="cpu")  # freed at once; its pages are never touched
