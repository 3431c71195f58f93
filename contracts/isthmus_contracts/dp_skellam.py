"""Privacy accounting of integer noise that clients add: the Skellam mechanism, and the integer grid that it acts on.

A client's change of the model is scaled to the grid and truncated to whole steps, which cannot make it longer, and each
coordinate gets the difference of two Poisson variables. The sum of such differences is one of the same kind, with the
sum of the variances, so what is opened has Skellam noise, however many clients contribute. Its Renyi divergence is
bounded by theorem 3.5 and corollary 4.1 of Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private
Federated Learning" (2021). Amplification by sampling is not claimed; docs/training/privacy.md explains why.
"""

import math
from dataclasses import dataclass

# Integers, as the theorem requires. Between them the optimum is flat.
_ORDERS = (*range(2, 257), *(round(256 * 2 ** (power / 8)) for power in range(1, 97)))
# Standard deviations of the noise that fit into the ring beside the clients' values. With more than 1,000 steps of
# noise, a coordinate exceeds them with a probability below 1e-30.
_TAILS = 12.0
COUNT_STEPS = 2**10
"""Steps per client of the noise on a count of clients."""


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

    def after(self, *lines: tuple[float, float], sums: int = 1) -> "SkellamSpent":
        """Return the privacy spent after ``sums`` further sums, whose bounds of :func:`renyi_line` add up."""
        slope, offset = (sum(each) for each in zip(*lines, strict=True))
        return SkellamSpent(self.rounds + sums, self.slope + sums * slope, self.offset + sums * offset)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon for a delta."""
        return epsilon_of_line(self.slope, self.offset, delta)


@dataclass(frozen=True)
class Grid:
    """Integer grid of the clipped changes, and the noise on it."""

    steps: int
    """Steps in one clipping norm: the largest L2 norm of one client's truncated change."""
    mean: int
    """Mean of each of the two Poisson variables whose difference is one client's noise on a coordinate; 0: none."""
    contributors: int
    """Number of contributors whose noise is enough."""

    @property
    def deviation(self) -> float:
        """Standard deviation of one client's noise on a coordinate, in steps."""
        return math.sqrt(2 * self.mean)

    @property
    def variance(self) -> int:
        """Least variance of the noise of an opened sum, in squared steps."""
        return 2 * self.mean * self.contributors

    @property
    def line(self) -> tuple[float, float]:
        """Bound of the divergences of an opened sum."""
        # The L1 norm of whole numbers is at most their squared L2 norm. On a fine grid the difference does not show.
        return renyi_line(float(self.steps) ** 2, float(self.steps) ** 2, self.variance)

    def reach(self, clients: int) -> float:
        """Return the largest absolute value of a coordinate of the sum of ``clients``, in steps."""
        return clients * self.steps + _TAILS * math.sqrt(clients) * self.deviation


def poisson_mean(deviation: float, contributors: int) -> int:
    """Return the mean of each Poisson variable of a client, for this deviation of ``contributors`` together."""
    return math.ceil(deviation * deviation / (2 * contributors) * (1 + 1e-12))


def count_line(mean: int, contributors: int) -> tuple[float, float]:
    """Return the bound for a count of clients with noise of :func:`count_mean`. A client changes it by one half."""
    change = COUNT_STEPS / 2
    return renyi_line(change * change, change, 2.0 * mean * contributors)


def count_mean(deviation: float, contributors: int) -> int:
    """Return the mean of each Poisson variable of a client for noise on a count, in steps of ``1 / COUNT_STEPS``.

    ``deviation``: standard deviation of the noise of ``contributors`` together, in clients.
    """
    return poisson_mean(deviation * COUNT_STEPS, contributors)


def grid_of(bits: int, clients: int, noise_multiplier: float, contributors: int) -> Grid:
    """Return the finest grid for which the sum of ``clients`` with its noise fits into the ring.

    ``contributors``: the least number of clients in an opened sum. Together, the noise of that many has a standard
    deviation of ``noise_multiplier`` times the clipping norm. Raises ``ValueError`` for a ring that has no room.
    """
    most = 2 ** (bits - 1) - 1

    def candidate(steps: int) -> Grid:
        return Grid(steps, poisson_mean(noise_multiplier * steps, contributors), contributors)

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if candidate(middle).reach(clients) <= most else (low, middle)
    if low == 0:
        noise = f" and noise of {noise_multiplier:g} clipping norms" if noise_multiplier else ""
        raise ValueError(f"a ring of {bits} bits has no room for {clients} clients{noise}")
    return candidate(low)
