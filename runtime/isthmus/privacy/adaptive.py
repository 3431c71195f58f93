"""Clipping norm that follows a quantile of the clients' norms, at no further cost of privacy."""

import math
from dataclasses import dataclass

from isthmus_contracts.api.privacy import DifferentialPrivacy

# Steps per client to which the aggregator's noise on the count is rounded: the last bits of a double would reveal the
# count. (Noise of the clients has ``dp_skellam.COUNT_STEPS``.)
_COUNT_STEPS = 2**20
# Range of the norm. A wrong quantile must not lead to zero or infinity.
_LEAST, _MOST = 1e-12, 1e12
# Default noise of the count, as a share of the expected updates: section 3.1 of the paper.
_SHARE_OF_EXPECTED = 1 / 20


@dataclass(frozen=True)
class Adaptation:
    """Quantile-based adaptive clipping: Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning with
    Adaptive Clipping" (2021), algorithm 1 with the geometric update.

    Each client has a bit, 1 if its change is within the norm. Their noisy count gives the share of such clients, and
    the norm moves towards the value at which the share is the quantile.
    """

    quantile: float
    rate: float
    count_noise: float
    """Standard deviation of the noise on the count of clients."""
    expected: int
    """Expected number of updates of a round, which the count is divided by: it does not depend on the clients."""

    @classmethod
    def of(cls, spec: DifferentialPrivacy, expected: int) -> "Adaptation | None":
        """Return the adaptation that a manifest asks for, with a number of expected updates."""
        asked = spec.adaptive_clipping
        if asked is None:
            return None
        default = max(expected * _SHARE_OF_EXPECTED, float(spec.noise_multiplier))
        noise = default if asked.count_noise is None else float(asked.count_noise)
        return cls(float(asked.quantile), float(asked.learning_rate), noise, expected)

    def sum_multiplier(self, noise_multiplier: float) -> float:
        """Return the sum's noise multiplier with which sum and count together cost as much as ``noise_multiplier``.

        Theorem 1: z_sum = (z^-2 - (2 sigma_b)^-2)^(-1/2). The bits count as 1/2 and -1/2, so that removing a client
        changes their sum by 1/2. Both releases are Gaussian, so the account stays exact.
        """
        return 1 / math.sqrt(noise_multiplier**-2 - (2 * self.count_noise) ** -2)

    def share(self, within: float, updates: int, normal: float) -> float:
        """Return the noisy share of expected updates whose change is within the norm. A missing update counts half.

        ``within``: their number. ``normal``: a standard normal number, or 0 if ``within`` has its noise already.
        """
        noise = round(self.count_noise * _COUNT_STEPS * normal) / _COUNT_STEPS
        return 0.5 + (within - updates / 2 + noise) / self.expected

    def next_norm(self, norm: float, share: float) -> float:
        """Return the norm of the next round, after one in which this share of updates was within ``norm``."""
        # Noise can take the share far beyond its range where few clients are expected.
        step = self.rate * (min(max(share, 0.0), 1.0) - self.quantile)
        return min(max(norm * math.exp(-step), _LEAST), _MOST)
