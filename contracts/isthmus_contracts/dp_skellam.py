"""Privacy accounting of integer noise that clients add: the Skellam mechanism, and the integer grid that it acts on.

A client's change of the model is scaled to the grid and rounded at random, and each coordinate gets the difference of
two Poisson variables. The sum of such differences is one of the same kind, with the sum of the variances, so what is
opened has Skellam noise, however many clients contribute. Its Renyi divergence is bounded by theorem 3.5 and corollary
4.1 of Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated Learning" (2021).
Amplification by sampling is not claimed; docs/training/privacy.md explains why.
"""

import math
from dataclasses import dataclass

# Integers, as the theorem requires. Between them the optimum is flat.
_ORDERS = (*range(2, 257), *(round(256 * 2 ** (power / 8)) for power in range(1, 97)))
# Probability that a rounding at random is too long and is drawn again, at most.
_REDRAWN = 1e-3
# Standard deviations of the noise that fit into the ring beside the clients' values. With more than 1,000 steps of
# noise, a coordinate exceeds them with a probability below 1e-30.
_TAILS = 12.0


def renyi_line(squared: float, absolute: float, variance: float) -> tuple[float, float]:
    """Return slope and offset of a bound: ``slope * order + offset`` is at least the divergence of any integer order.

    ``squared``: squared L2 sensitivity. ``absolute``: L1 sensitivity. ``variance``: of the noise on each coordinate of
    the sum. All are in steps of the grid. Theorem 3.5, in whose minimum the first term is the smaller one unless there
    is almost no noise.
    """
    correction = squared / (4 * variance * variance)
    return squared / (2 * variance) + 2 * correction, 6 * absolute / (4 * variance * variance) - correction


def epsilon_of_line(slope: float, offset: float, delta: float) -> float:
    """Return the epsilon for a delta that follows from Renyi divergences of at most ``slope * order + offset``.

    Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy" (2020), proposition 12.
    """
    if slope == 0:
        return 0.0

    def epsilon(order: int) -> float:
        return slope * order + offset + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return max(0.0, min(map(epsilon, _ORDERS)))


@dataclass(frozen=True)
class SkellamSpent:
    """Privacy spent by the opened sums: an upper bound."""

    rounds: int = 0
    slope: float = 0.0
    offset: float = 0.0

    def after(self, squared: float, absolute: float, variance: float, rounds: int = 1) -> "SkellamSpent":
        """Return the privacy spent after ``rounds`` further sums. The arguments are those of :func:`renyi_line`."""
        slope, offset = renyi_line(squared, absolute, variance)
        return SkellamSpent(self.rounds + rounds, self.slope + rounds * slope, self.offset + rounds * offset)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon for a delta."""
        return epsilon_of_line(self.slope, self.offset, delta)


@dataclass(frozen=True)
class Grid:
    """Integer grid of the clipped changes, and the noise on it."""

    steps: int
    """Steps in one clipping norm."""
    squared: int
    """Largest squared L2 norm of one client's rounded change, in steps."""
    absolute: float
    """Largest L1 norm of it, in steps."""
    mean: int
    """Mean of each of the two Poisson variables whose difference is one client's noise on a coordinate."""
    contributors: int
    """Number of contributors whose noise is enough."""

    @property
    def deviation(self) -> float:
        """Standard deviation of one client's noise on a coordinate, in steps."""
        return math.sqrt(2 * self.mean)

    @property
    def variance(self) -> int:
        """Variance of the noise of an opened sum, in squared steps, at least."""
        return 2 * self.mean * self.contributors

    @property
    def rounding_cost(self) -> float:
        """Factor by which rounding lengthens a client's change at most, and with it the noise."""
        return math.sqrt(self.squared) / self.steps

    def reach(self, clients: int) -> float:
        """Return the largest absolute value of a coordinate of the sum of ``clients``, in steps."""
        return clients * math.sqrt(self.squared) + _TAILS * math.sqrt(clients) * self.deviation

    def after(self, spent: SkellamSpent, sums: int = 1) -> SkellamSpent:
        """Return the privacy spent after ``sums`` further opened sums on this grid."""
        return spent.after(self.squared, self.absolute, self.variance, sums)


def rounded_norm(steps: float, coordinates: int, redrawn: float = _REDRAWN) -> float:
    """Return a bound of the squared L2 norm of a vector of ``steps`` length after rounding at random, in steps.

    A rounding that exceeds it is drawn again, so the bound always holds; ``redrawn`` bounds how often that happens.
    Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism" (2021), equation 1.
    """
    root = math.sqrt(coordinates)
    often = steps * steps + coordinates / 4 + math.sqrt(2 * math.log(1 / redrawn)) * (steps + root / 2)
    return min(often, (steps + root) ** 2)


def grid_of(bits: int, clients: int, coordinates: int, noise_multiplier: float, contributors: int) -> Grid:
    """Return the finest grid for which the sum of ``clients`` with its noise fits into the ring.

    ``contributors``: the least number of clients in an opened sum. Together, the noise of that many has a standard
    deviation of ``noise_multiplier`` times the length of one client's rounded change. Raises ``ValueError`` for a ring
    that has no room.
    """
    most = 2 ** (bits - 1) - 1

    def candidate(steps: int) -> Grid:
        squared = math.ceil(rounded_norm(steps, coordinates))
        mean = math.ceil(noise_multiplier * noise_multiplier * squared / (2 * contributors) * (1 + 1e-12))
        absolute = min(math.sqrt(squared) * math.sqrt(coordinates), squared)
        return Grid(steps, squared, absolute, mean, contributors)

    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if candidate(middle).reach(clients) <= most else (low, middle)
    if low == 0:
        raise ValueError(
            f"a ring of {bits} bits has no room for {clients} clients with {coordinates:,} coordinates and a"
            f" noiseMultiplier of {noise_multiplier:g}"
        )
    return candidate(low)
