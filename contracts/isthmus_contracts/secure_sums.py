"""Bounds of secure aggregation that the manifest's checks and the protocol share. Pure functions."""

FEWEST_CLIENTS = 3
"""Least number of contributors of an opened sum: with two, each could compute the other's update from it."""


def threshold(holders: int, foreign: int = 0) -> int:
    """Return the number of shares that recover a secret, of all that its holders (owner included) have.

    More than two thirds (Bonawitz et al. 2017, section 6.2). ``foreign``: the most holders that are of one party other
    than the owner's. If these collude with the aggregator, they give it both kinds of share. It shows the honest
    holders two lists of survivors, and needs ``threshold - foreign`` of them for either kind; more than
    ``(holders + foreign) / 2`` shares cannot be had for both.
    """
    return max(2 * holders // 3, (holders + foreign) // 2) + 1
