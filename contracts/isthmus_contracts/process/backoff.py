"""Exponential back-off between attempts."""

_MAX_DOUBLINGS = 64  # enough for every limit; a float overflows at 1,024


def delay(failures: int, first: float, longest: float) -> float:
    """Return the seconds to wait after this many failures in a row (1 or more).

    The delay is ``first`` after one failure and doubles with each further one, up to ``longest``.
    """
    return min(first * 2.0 ** min(max(failures - 1, 0), _MAX_DOUBLINGS), longest)
