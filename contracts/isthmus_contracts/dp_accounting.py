"""What differential privacy costs: the exact guarantee of a Gaussian mechanism, and of many of them in a row.

A round adds noise of ``noise_multiplier`` times the sensitivity: it is mu-GDP with mu = 1 / noise_multiplier. Rounds
compose, also where each depends on those before, to sqrt(mu_1^2 + mu_2^2 + ...)-GDP, and mu-GDP is (epsilon, delta)-DP
exactly where :func:`delta_of` says so (Dong, Roth and Su, "Gaussian Differential Privacy", 2022, sections 2
and 3). No amplification by sampling is claimed: docs/training/privacy.md tells why.
"""

import math
from dataclasses import dataclass

_LARGE = 25.0  # from here on, the asymptotic series of erfcx is exact to 10 digits


def delta_of(mu: float, epsilon: float) -> float:
    """The least delta for which mu-GDP is (epsilon, delta)-DP.

    Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy" (2018), theorem 8:
    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu); without its overflow.
    """
    if mu == 0:
        return 0.0
    low, high = (epsilon / mu - mu / 2) / math.sqrt(2), (epsilon / mu + mu / 2) / math.sqrt(2)
    if low > 0:
        return math.exp(-low * low) * (_erfcx(low) - _erfcx(high)) / 2
    return (math.erfc(low) - math.exp(-low * low) * _erfcx(high)) / 2


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon for which mu-GDP is (epsilon, delta)-DP, rounded up to ten digits."""
    if mu == 0 or delta_of(mu, 0.0) <= delta:
        return 0.0
    # Bun and Steinke, "Concentrated Differential Privacy" (2016), proposition 1.3: never less.
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high


def noise_for(epsilon: float, delta: float, rounds: int) -> float:
    """The least noise multiplier with which so many rounds cost at most ``epsilon``, rounded up to ten digits."""
    low, high = 0.0, 1.0
    while epsilon_of(high, delta) <= epsilon:
        high *= 2
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of(middle, delta) <= epsilon else (low, middle)
    return math.sqrt(rounds) / low


def _erfcx(x: float) -> float:
    """exp(x^2) erfc(x), for x above 0."""
    if x < _LARGE:
        return math.exp(x * x) * math.erfc(x)
    square = x * x
    return (1 - 1 / (2 * square) + 3 / (4 * square * square)) / (x * math.sqrt(math.pi))


@dataclass(frozen=True)
class Spent:
    """What the published rounds have cost so far."""

    rounds: int = 0
    mu_squared: float = 0.0

    def after(self, noise_multiplier: float, rounds: int = 1) -> "Spent":
        """The same with so many rounds more."""
        return Spent(self.rounds + rounds, self.mu_squared + rounds / noise_multiplier**2)

    def epsilon(self, delta: float) -> float:
        """The epsilon that goes with a delta."""
        return epsilon_of(math.sqrt(self.mu_squared), delta)
