"""How much of what is freed the C library keeps: enough that the chunks of streams lie in memory that is there already,
and so little that memory is as flat after a thousand rounds."""

import os

import torch

from .libc import c_function

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# gRPC's threads come and go, and what one of them has read is freed by another: with an arena for each, as is glibc's
# habit, the holes add up to more than a hundred megabytes within a hundred rounds. Two are as fast as eight per core.
_ARENAS = 2
# Chunks of streams, of at most a megabyte, are used again and again; what is larger, or more than this, is given back.
_KEPT_BYTES = 4 << 20


def keep_memory_flat() -> None:
    """For a process of ours, to be called before threads begin. Who has set ``MALLOC_ARENA_MAX``, or has no glibc, is
    left alone."""
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    if (mallopt := c_function("mallopt")) is None:
        return
    for parameter, value in (
        (_M_ARENA_MAX, _ARENAS),
        (_M_MMAP_THRESHOLD, _KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
    ):
        mallopt(parameter, value)


def give_back() -> None:
    """Return to the system what is free, wherever it lies. It takes a while: not for a loop. Source: malloc_trim(3)."""
    if (malloc_trim := c_function("malloc_trim")) is not None:
        malloc_trim(0)


def keep_chunks() -> None:
    """For a process of the user's, whose settings stay: glibc keeps twice as much as the largest block that was freed,
    up to 64 MB, so that a script that has freed a tensor of a few megabytes has this already. Without it every chunk
    is read into fresh pages, which costs more than to copy it. Source: mallopt(3), ``M_MMAP_THRESHOLD``."""
    torch.empty(_KEPT_BYTES, dtype=torch.uint8, device="cpu")  # freed at once, and never touched, so it takes no memory
