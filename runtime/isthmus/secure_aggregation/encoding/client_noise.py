"""Noise that a client adds to its integers before it masks them, so that the opened sum is private."""

from collections.abc import Callable

import torch

from isthmus_contracts.dp_skellam import COUNT_STEPS, count_mean
from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from ...entropy import keystream
from ...tensors import State
from ..layout import grid
from . import scalars
from .poisson import skellam

Noise = Callable[[str, torch.Tensor], None]
"""Function that adds a client's own noise to the integers (int64, one dimension) of a part of a masked tensor."""


def coordinate_noise(layout: pb.SecureLayout) -> Noise | None:
    """Return the noise of one client that a layout asks for, from a new key; ``None`` if it asks for none.

    Skellam noise (Agarwal, Kairouz and Liu 2021): with the noise of ``layout.noise.contributors`` clients or more, the
    sum is as private as the noise multiplier says, against the aggregator as well.
    """
    if not layout.noise.noise_multiplier:
        return None
    mean, entropy = grid(layout).mean, keystream()

    def add(_: str, numbers: torch.Tensor) -> None:
        numbers.add_(torch.from_numpy(skellam(mean, len(numbers), entropy)))

    return add


def add_count_noise(layout: pb.SecureLayout, tensors: State) -> None:
    """Add a client's noise to its bit that says whether its change was too long, if the layout asks for it."""
    if not layout.noise.count_noise:
        return
    place = next(number for number, scalar in enumerate(layout.scalars) if scalar.name == scalars.LONG)
    steps = (1 << scalars.fraction_bits(layout, layout.scalars[place])) // COUNT_STEPS
    mean = count_mean(layout.noise.count_noise, layout.noise.contributors)
    tensors[scalars.SCALARS][place] += int(skellam(mean, 1, keystream())[0]) * steps
