"""The privacy account, compared with other accountants and published values."""

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus_contracts.dp_accounting import Spent, delta_of, epsilon_of, noise_for


def spent(*rounds: tuple[float, int]) -> Spent:
    account = Spent()
    for noise_multiplier, count in rounds:
        account = account.after(noise_multiplier, count)
    return account


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([(1.0, 1)], 1e-5),
        ([(2.0, 10)], 1e-5),
        ([(0.5, 3)], 1e-6),
        ([(10.0, 100)], 1e-5),
        ([(3.0, 20), (1.5, 5)], 1e-7),
    ],
)
def test_it_is_as_tight_as_opacus_and_never_looser(history: list[tuple[float, int]], delta: float) -> None:
    """PRV bounds epsilon from above, by at most 0.01 (its own error); Renyi's bound is looser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Opacus
        from opacus.accountants import PRVAccountant, RDPAccountant

        exact = spent(*history).epsilon(delta)
        prv, rdp = PRVAccountant(), RDPAccountant()
        prv.history = rdp.history = [(noise, 1.0, count) for noise, count in history]
        assert prv.get_epsilon(delta) - 0.02 <= exact <= prv.get_epsilon(delta)
        assert exact <= rdp.get_epsilon(delta) <= 1.15 * exact


@pytest.mark.parametrize(
    ("mu", "epsilon", "delta"),
    [
        # Dong, Roth and Su (2022), figure 3: 1-GDP by definition, from tables of the normal distribution:
        # Phi(1/2 - e) - exp(e) Phi(-1/2 - e) at e = 1 and 2.
        (1.0, 1.0, 0.3085375387 - math.e * 0.0668072013),
        (1.0, 2.0, 0.0668072013 - math.exp(2) * 0.0062096653),
        # At epsilon 0 delta is the total variation distance of N(0, 1) and N(mu, 1).
        (2.0, 0.0, 0.6826894921),
    ],
)
def test_it_is_the_papers_formula(mu: float, epsilon: float, delta: float) -> None:
    assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-6)
    if epsilon:
        assert epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-6)


@given(st.floats(1e-3, 1e4), st.floats(-14, -1).map(lambda power: 10**power))
def test_epsilon_is_the_least_that_delta_allows(mu: float, delta: float) -> None:
    epsilon = epsilon_of(mu, delta)
    assert delta_of(mu, epsilon) <= delta * (1 + 1e-9)
    if epsilon:
        assert delta_of(mu, epsilon * (1 - 1e-6)) >= delta * (1 - 1e-9)
        # Bun and Steinke (2016), proposition 1.3.
        assert epsilon <= mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 50)), min_size=1, max_size=5))
def test_rounds_add_up_in_any_order(history: list[tuple[float, int]]) -> None:
    one, other = spent(*history), spent(*reversed(history))
    assert one.rounds == other.rounds == sum(count for _, count in history)
    assert one.epsilon(1e-5) == pytest.approx(other.epsilon(1e-5), rel=1e-9)
    assert one.epsilon(1e-5) <= one.after(5.0).epsilon(1e-5)


def test_nothing_published_costs_nothing() -> None:
    assert Spent().epsilon(1e-5) == 0.0


@pytest.mark.parametrize("noise", [1e-4, 1e5])
def test_extremes_do_not_overflow(noise: float) -> None:
    assert math.isfinite(spent((noise, 1_000_000)).epsilon(1e-5))


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 20), (8.0, 100), (30.0, 5)])
def test_the_noise_for_a_budget(epsilon: float, rounds: int) -> None:
    noise = noise_for(epsilon, 1e-5, rounds)
    assert spent((noise, rounds)).epsilon(1e-5) <= epsilon
    assert spent((noise * (1 - 1e-6), rounds)).epsilon(1e-5) > epsilon
