"""Differential privacy: clipped contributions, and noise on their sum."""

from .adaptive import Adaptation
from .mechanism import Private

__all__ = ["Adaptation", "Private"]
