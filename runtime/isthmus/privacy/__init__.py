"""Differential privacy at the aggregator: bounded contributions, and noise once for each round."""

from .mechanism import Private

__all__ = ["Private"]
