"""The C library's own functions, which Python has no name for."""

import ctypes
from typing import Any


def c_function(name: str) -> Any | None:
    """One of them, for ctypes; ``None`` where the system has no such function."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
