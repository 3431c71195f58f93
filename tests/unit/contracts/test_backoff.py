"""Delays double up to their limit, for any number of failures."""

import pytest

from isthmus_contracts.process.backoff import delay


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 0.5), (1, 0.5), (2, 1.0), (3, 2.0), (7, 32.0), (8, 60.0), (10**6, 60.0)]
)
def test_the_delay_doubles_up_to_the_limit(failures: int, seconds: float) -> None:
    assert delay(failures, 0.5, 60.0) == seconds


def test_a_first_delay_above_the_limit_is_cut() -> None:
    assert delay(1, 90.0, 60.0) == 60.0
