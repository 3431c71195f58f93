"""Privacy accounting: the exact guarantee of a Gaussian mechanism and of its composition over rounds.

A round adds noise of ``noise_multiplier`` times the sensitivity: it is mu-GDP with mu = 1 / noise_multiplier. Rounds
compose, also adaptively, to sqrt(mu_1^2 + mu_2^2 + ...)-GDP. mu-GDP is (epsilon, delta)-DP exactly for the delta of
:func:`delta_of` (Dong, Roth and Su, "Gaussian Differential Privacy", 2022, sections 2
and 3). Amplification by sampling is not claimed; docs/training/privacy.md explains why.
"""

import math
from dataclasses import dataclass

_LARGE = 25.0  # above this, the asymptotic series of erfcx is exact to 10 digits


def delta_of(mu: float, epsilon: float) -> float:
    """Return the least delta for which mu-GDP is (epsilon, delta)-DP.

    Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy" (2018), theorem 8:
    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu), rearranged to avoid overflow.
    """
    if mu == 0:
        return 0.0
    low, high = (epsilon / mu - mu / 2) / math.sqrt(2), (epsilon / mu + mu / 2) / math.sqrt(2)
    if low > 0:
        return math.exp(-low * low) * (_erfcx(low) - _erfcx(high)) / 2
    return (math.erfc(low) - math.exp(-low * low) * _erfcx(high)) / 2


def epsilon_of(mu: float, delta: float) -> float:
    """Return the least epsilon for which mu-GDP is (epsilon, delta)-DP, rounded up to ten digits."""
    if mu == 0 or delta_of(mu, 0.0) <= delta:
        return 0.0
    # Bun and Steinke, "Concentrated Differential Privacy" (2016), proposition 1.3: an upper bound.
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high


def noise_for(epsilon: float, delta: float, rounds: int) -> float:
    """Return the least noise multiplier for ``rounds`` rounds within ``epsilon``, rounded up to ten digits."""
    low, high = 0.0, 1.0
    while epsilon_of(high, delta) <= epsilon:
        high *= 2
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of(middle, delta) <= epsilon else (low, middle)
    return math.sqrt(rounds) / low


def _erfcx(x: float) -> float:
    """Return exp(x^2) erfc(x), for x above 0."""
    if x < _LARGE:
        return math.exp(x * x) * math.erfc(x)
    square = x * x
    return (1 - 1 / (2 * square) + 3 / (4 * square * square)) / (x * math.sqrt(math.pi))


@dataclass(frozen=True)
class Spent:
    """Privacy spent by the published rounds."""

    rounds: int = 0
    mu_squared: float = 0.0

    def after(self, noise_multiplier: float, rounds: int = 1) -> "Spent":
        """Return the privacy spent after ``rounds`` further rounds with this noise multiplier."""
        return Spent(self.rounds + rounds, self.mu_squared + rounds / noise_multiplier**2)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon for a delta."""
        return epsilon_of(math.sqrt(self.mu_squared), delta)
