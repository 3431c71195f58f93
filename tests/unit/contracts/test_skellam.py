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
from isthmus_contracts.dp_skellam import SkellamSpent, epsilon_of_line, grid_of, renyi_line, rounded_norm

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
    ours = SkellamSpent().after(steps**2, steps, (noise * steps) ** 2, rounds).epsilon(case["delta"])
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
    one = SkellamSpent().after(64.0, 64.0, 4096.0, 3)
    assert one.after(64.0, 64.0, 4096.0, 2) == SkellamSpent().after(64.0, 64.0, 4096.0, 5)
    assert one.rounds == 3 and one.epsilon(1e-5) < one.after(64.0, 64.0, 4096.0).epsilon(1e-5)
    assert SkellamSpent().epsilon(1e-5) == 0.0


@given(
    st.sampled_from([16, 32]),
    st.integers(3, 300),
    st.integers(1, 10**9),
    st.floats(1e-2, 50),
    st.floats(0.67, 1.0),
)
def test_a_grid_fits_its_ring_and_has_the_noise(bits: int, clients: int, size: int, noise: float, share: float) -> None:
    contributors = math.ceil(share * clients)
    try:
        grid = grid_of(bits, clients, size, noise, contributors)
    except ValueError as error:
        assert bits == 16 and "has no room" in str(error)
        return
    assert grid.reach(clients) <= 2 ** (bits - 1) - 1
    # The noise of the fewest contributors, compared with the longest change.
    assert grid.variance >= noise**2 * grid.squared
    assert grid.squared >= grid.steps**2
    # The account is that of the central mechanism, plus what the grid costs.
    gaussian = epsilon_of_line(grid.squared / (2 * grid.variance), 0.0, 1e-5)
    assert gaussian * (1 - 1e-6) <= grid.after(SkellamSpent()).epsilon(1e-5)


def test_a_fine_grid_costs_nothing_and_a_coarse_one_little() -> None:
    fine, coarse = grid_of(32, 16, 2_500_000, 4.0, 11), grid_of(16, 16, 13_258, 4.0, 11)
    assert fine.rounding_cost < 1.0001 and coarse.rounding_cost < 1.02
    for grid in (fine, coarse):
        exact = Spent().after(4.0, 100).epsilon(1e-5)
        assert exact <= grid.after(SkellamSpent(), 100).epsilon(1e-5) <= 1.08 * exact


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a ring of 16 bits has no room for 10000 clients with 100 coordinates"):
        grid_of(16, 10_000, 100, 100.0, 6667)


@pytest.mark.parametrize("size", [1, 50, 20_000])
@pytest.mark.parametrize("steps", [3.0, 300.0])
def test_roundings_are_rarely_drawn_again(size: int, steps: float) -> None:
    dice = np.random.default_rng(size)
    vector = dice.standard_normal(size)
    vector *= steps / np.linalg.norm(vector)
    bound, long = rounded_norm(steps, size), 0
    for _ in range(200):
        rounded = np.floor(vector + dice.random(size))
        assert float(np.square(rounded).sum()) <= (steps + math.sqrt(size)) ** 2
        long += float(np.square(rounded).sum()) > bound
    assert long <= 2
