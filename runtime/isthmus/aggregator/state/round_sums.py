"""Opened sum of a round of secure aggregation, as far as records and the status show it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundSums:
    """Sums over all contributors. Nothing here belongs to a single client."""

    examples: float = 0.0
    """Training examples of all contributors; with differential privacy their number."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means of the training metrics, weighted by examples."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Means of the base model's metrics, weighted by examples; empty if no contributor has evaluated it."""
    clipped_ratio: float = 0.0
    """Share of all contributors' coordinates that the layout's bounds cut."""
    dropouts: int = 0
    """Clients that began the instance and are not in the sum."""
    parties: int = 0
    """Parties that the contributors belong to."""
