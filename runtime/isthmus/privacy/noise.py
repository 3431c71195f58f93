"""Gaussian noise from a cryptographic generator."""

import math
import os

import numpy as np
import numpy.typing as npt

from ..entropy import Entropy

Normals = npt.NDArray[np.float64]


def gaussian(count: int, entropy: Entropy = os.urandom) -> Normals:
    """Return ``count`` standard normal numbers, by Box and Muller (1958) from the system's cryptographic generator.

    The state of a generator such as torch's or numpy's can be recovered from a few outputs, and a model reveals
    millions. With 64 bits for each radius the tails end at 9.4 standard deviations, which a normal number exceeds with
    a probability of 5e-21.
    """
    pairs = (count + 1) // 2
    bits = np.frombuffer(entropy(16 * pairs), dtype="<u8")
    radius = np.sqrt(-2.0 * np.log((bits[:pairs].astype(np.float64) + 1.0) * 2.0**-64))
    angle = bits[pairs:].astype(np.float64) * (2.0**-64 * 2.0 * math.pi)
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
