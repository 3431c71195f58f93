"""Functions of the C library that Python's standard library does not expose."""

import ctypes
import mmap
from typing import Any

_MADV_DONTNEED = 4  # mman-common.h of Linux


def libc_function(name: str) -> Any | None:
    """Return a function of the C library, for ctypes, or ``None`` if the platform lacks it."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


def give_pages_back(address: int, length: int) -> None:
    """Let the kernel take back the whole pages in a range of memory (madvise(2)), whose content is not needed any more.

    Afterwards the pages have zeros, or what is in the file that they are mapped from. No effect where the platform
    lacks the function.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0 and (advise := libc_function("madvise")) is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_DONTNEED)
