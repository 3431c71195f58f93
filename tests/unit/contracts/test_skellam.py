"""The account of the clients' integer noise, compared with exact divergences and an independent accountant."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from isthmus_contracts.dp_accounting import Spent
from isthmus_contracts.dp_skellam import (
    Grid,
    SkellamSpent,
    count_line,
    count_mean,
    epsilon_of_line,
    grid_of,
    poisson_mean,
    renyi_line,
)

# Written by python -m bench.peers.accountant.
REFERENCE = [json.loads(line) for line in (Path(__file__).parent / "accountant.jsonl").read_text().splitlines()]


def log_skellam(values: np.ndarray, variance: float) -> np.ndarray:
    return np.log(special.ive(np.abs(values), variance))


def divergence(order: int, sensitivity: int, variance: float) -> float:
    """Return the exact Renyi divergence of one coordinate that moves by ``sensitivity``."""
    reach = math.ceil(12 * math.sqrt(variance)) + sensitivity * order
    values = np.arange(-reach, reach + 1)
    moved, still = log_skellam(values - sensitivity, variance), log_skellam(values, variance)
    return float(special.logsumexp(order * moved + (1 - order) * still)) / (order - 1)


@pytest.mark.parametrize("order", [2, 3, 8, 20])
@pytest.mark.parametrize("sensitivity", [1, 2, 10])
@pytest.mark.parametrize("noise", [2.0, 4.0, 15.0])
def test_the_bound_holds_and_is_close(order: int, sensitivity: int, noise: float) -> None:
    variance = (noise * sensitivity) ** 2
    slope, offset = renyi_line(sensitivity**2, sensitivity, variance)
    exact, bound = divergence(order, sensitivity, variance), slope * order + offset
    assert exact <= bound
    # Close to the truth for a sensitivity of ten steps or more.
    assert bound <= exact * (1.06 if sensitivity == 10 else 3)


@pytest.mark.parametrize(
    "case", REFERENCE, ids=lambda case: f"{case['sensitivity']}-{case['noise_multiplier']}-{case['rounds']}"
)
def test_an_independent_accountant_reports_less_and_not_much_less(case: dict[str, float]) -> None:
    """Its privacy losses are those of one coordinate, for which the discretised account is tight."""
    steps, noise, rounds = int(case["sensitivity"]), case["noise_multiplier"], int(case["rounds"])
    ours = SkellamSpent().after(renyi_line(steps**2, steps, (noise * steps) ** 2), sums=rounds).epsilon(case["delta"])
    assert case["skellam_losses"] <= ours
    if steps == 64:
        # What Renyi's divergences cost, as for Gaussian noise.
        assert ours <= 1.1 * case["skellam_losses"]
        assert ours == pytest.approx(case["gaussian_renyi"], rel=0.01)
    # The central noise's account is the limit of a fine grid.
    assert Spent().after(noise, rounds).epsilon(case["delta"]) == pytest.approx(case["gaussian_losses"], abs=2e-3)


@pytest.mark.parametrize("noise", [2.0, 5.0])
def test_the_conversion_from_divergences_is_an_upper_bound(noise: float) -> None:
    """For a Gaussian mechanism, whose divergences are a line, the exact epsilon is known."""
    for rounds in (1, 10, 100):
        exact = Spent().after(noise, rounds).epsilon(1e-5)
        assert exact <= epsilon_of_line(rounds / (2 * noise**2), 0.0, 1e-5) <= 1.12 * exact
    assert epsilon_of_line(0.0, 0.0, 1e-5) == 0.0


def test_sums_add_up_and_nothing_opened_costs_nothing() -> None:
    line = renyi_line(64.0, 64.0, 4096.0)
    one = SkellamSpent().after(line, sums=3)
    assert one.after(line, sums=2) == SkellamSpent().after(line, sums=5)
    assert one.rounds == 3 and one.epsilon(1e-5) < one.after(line).epsilon(1e-5)
    assert SkellamSpent().epsilon(1e-5) == 0.0


@given(st.sampled_from([16, 32]), st.integers(3, 300), st.floats(0, 50), st.floats(0.67, 1.0))
def test_a_grid_fits_its_ring_and_has_the_noise(bits: int, clients: int, noise: float, share: float) -> None:
    contributors = math.ceil(share * clients)
    try:
        grid = grid_of(bits, clients, noise, contributors)
    except ValueError as error:
        assert bits == 16 and "has no room" in str(error)
        return
    assert grid.reach(clients) <= 2 ** (bits - 1) - 1
    # The noise of the fewest contributors, compared with the longest change.
    assert grid.variance >= (noise * grid.steps) ** 2
    # No finer grid fits.
    finer = Grid(grid.steps + 1, poisson_mean(noise * (grid.steps + 1), contributors), contributors)
    assert finer.reach(clients) > 2 ** (bits - 1) - 1
    if grid.variance:
        gaussian = epsilon_of_line(grid.steps**2 / (2 * grid.variance), 0.0, 1e-5)
        assert gaussian * (1 - 1e-6) <= SkellamSpent().after(grid.line).epsilon(1e-5)


def test_a_grid_costs_little() -> None:
    for grid in (grid_of(32, 16, 4.0, 11), grid_of(16, 16, 4.0, 11)):
        exact = Spent().after(4.0, 100).epsilon(1e-5)
        assert exact <= SkellamSpent().after(grid.line, sums=100).epsilon(1e-5) <= 1.08 * exact


def test_without_noise_the_clients_share_the_ring() -> None:
    assert grid_of(32, 16, 0.0, 1).steps == (2**31 - 1) // 16
    assert grid_of(32, 16, 0.0, 1).mean == 0


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a ring of 16 bits has no room for 40000 clients and noise of 100 clipping"):
        grid_of(16, 40_000, 100.0, 26_667)


def test_more_contributors_than_the_fewest_mean_more_noise() -> None:
    """Skellam variables add up: any set of survivors has the noise of its size."""
    grid = grid_of(32, 16, 2.0, 11)
    assert grid.variance == pytest.approx((2.0 * grid.steps) ** 2, rel=1e-6)
    assert 16 * grid.deviation**2 == pytest.approx(16 / 11 * grid.variance)


@pytest.mark.parametrize("noise", [0.6, 5.0, 50.0])
def test_a_count_costs_what_its_noise_says(noise: float) -> None:
    """A client moves it by one half: the account is that of a multiplier of twice the noise in clients."""
    mean = count_mean(noise, 11)
    exact = Spent().after(2 * noise, 30).epsilon(1e-5)
    assert exact <= SkellamSpent().after(count_line(mean, 11), sums=30).epsilon(1e-5) <= 1.2 * exact
    both = SkellamSpent().after(grid_of(32, 16, 2.0, 11).line, count_line(mean, 11))
    assert both.rounds == 1
    assert both.slope == pytest.approx(1 / (2 * 2.0**2) + 1 / (2 * (2 * noise) ** 2), rel=1e-3)
