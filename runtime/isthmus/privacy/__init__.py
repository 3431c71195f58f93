"""Differential privacy at the aggregator: clipped contributions, and noise once per round."""

from .mechanism import Private

__all__ = ["Private"]
