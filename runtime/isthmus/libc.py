"""Functions of the C library that Python's standard library does not expose."""

import ctypes
from typing import Any


def libc_function(name: str) -> Any | None:
    """Return a function of the C library, for ctypes, or ``None`` if the platform lacks it."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
