"""Accounts of the privacy that a job has spent, by the mechanism that adds the noise."""

from collections.abc import Mapping
from typing import Protocol

from isthmus_contracts.dp_accounting import Spent
from isthmus_contracts.dp_skellam import SkellamSpent


class Account(Protocol):
    """Privacy that is spent."""

    @property
    def rounds(self) -> int:
        """Number of releases."""

    def epsilon(self, delta: float) -> float:
        """Return the epsilon for a delta."""


class Costs(Protocol):
    """Rule by which each release adds to an account."""

    def of(self, account: Mapping[str, float]) -> Account:
        """Return the account in a round's record; an empty one has spent nothing."""

    def after(self, account: Account, releases: int) -> Account:
        """Return the account after further releases."""

    def numbers(self, account: Account) -> dict[str, float]:
        """Return the numbers from which the account follows, for a record."""


class CentralNoise(Costs):
    """Noise that the aggregator adds: the exact account."""

    def __init__(self, noise_multiplier: float) -> None:
        self._noise = noise_multiplier

    def of(self, account: Mapping[str, float]) -> Spent:
        return Spent(int(account.get("rounds", 0)), account.get("mu_squared", 0.0))

    def after(self, account: Account, releases: int) -> Spent:
        assert isinstance(account, Spent)
        return account.after(self._noise, releases)

    def numbers(self, account: Account) -> dict[str, float]:
        assert isinstance(account, Spent)
        return {"mu_squared": account.mu_squared}


class ClientNoise(Costs):
    """Skellam noise that clients add before they mask their updates: an upper bound."""

    def __init__(self, *lines: tuple[float, float]) -> None:
        """``lines``: bounds of a round's divergences, of the sum and of the count of long changes."""
        self._lines = lines

    def of(self, account: Mapping[str, float]) -> SkellamSpent:
        return SkellamSpent(
            int(account.get("rounds", 0)), account.get("renyi_slope", 0.0), account.get("renyi_offset", 0.0)
        )

    def after(self, account: Account, releases: int) -> SkellamSpent:
        assert isinstance(account, SkellamSpent)
        return account.after(*self._lines, sums=releases)

    def numbers(self, account: Account) -> dict[str, float]:
        assert isinstance(account, SkellamSpent)
        return {"renyi_slope": account.slope, "renyi_offset": account.offset}
