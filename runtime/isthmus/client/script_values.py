"""Conversion of numbers that a script passes, of any type."""

from typing import Any

import torch

from ..framing import MAX_EXAMPLES
from .errors import ScriptError


def as_number(name: str, value: Any) -> float:
    """Convert a number, or a tensor or an array of one element. Raises ``ValueError``, with ``name``, for others."""
    try:
        if not isinstance(value, torch.Tensor) and hasattr(value, "item"):
            value = value.item()  # float() rejects numpy arrays that have a dimension
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ScriptError(f"{name} must be a number, not {shown(value)}") from None


def as_count(name: str, value: Any) -> int:
    """Convert a whole number of at least 1 and at most 2**53. Raises ``ValueError``, with ``name``, for others."""
    try:
        number = as_number(name, value)
    except ValueError:
        number = 0.0
    if isinstance(value, bool) or not number.is_integer() or not 1 <= number <= MAX_EXAMPLES:
        raise ScriptError(f"{name} must be a whole number of at least 1 and at most 2**53, not {shown(value)}")
    return int(number)


def shown(value: object) -> str:
    """Format a value for a message: on one line, of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
