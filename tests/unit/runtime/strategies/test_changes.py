"""FedNova and q-FedAvg against their papers' formulas in NumPy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.strategies import Update, make_strategy
from isthmus.tensors import State, non_finite
from isthmus_contracts.api.strategy import Strategy as Spec

from .rounds import array, make, model, run, updates, weighted_mean


def with_scalar(contributions: list[Update], name: str, values: list[float]) -> list[Update]:
    return [
        replace(update, scalars={name: value}, buffers=frozenset({"b"}))
        for update, value in zip(contributions, values, strict=True)
    ]


def changes(contributions: list[Update], base: torch.Tensor) -> list[np.ndarray]:
    return [array(update.tensors["w"]) - array(base) for update in contributions]


def test_fednova_normalises_by_steps() -> None:
    strategy, base, steps = make("FedNova"), model(), [1.0, 4.0, 10.0]
    for number in range(3):
        contributions = with_scalar(updates(base, 3, seed=number), "steps", steps)
        total = sum(update.num_examples for update in contributions)
        shares = [update.num_examples / total for update in contributions]
        effective = sum(share * count for share, count in zip(shares, steps, strict=True))
        moves = changes(contributions, base["w"])
        expected = array(base["w"]) + effective * sum(
            share * move / count for share, move, count in zip(shares, moves, steps, strict=True)
        )
        result = run(strategy, base, contributions)
        np.testing.assert_allclose(array(result["w"]), expected, rtol=1e-5, atol=1e-6)
        # Tensors that are not trained are averaged.
        np.testing.assert_allclose(array(result["b"]), weighted_mean(contributions, "b"), rtol=1e-12)
        assert result["seen"].item() == round(float(weighted_mean(contributions, "seen")))
        base = result


def test_fednova_with_equal_steps_is_fedavg() -> None:
    base = model()
    contributions = with_scalar(updates(base, 3, seed=1), "steps", [7.0] * 3)
    torch.testing.assert_close(run(make("FedNova"), base, contributions), run(make("FedAvg"), base, contributions))


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 3.0])
def test_qfedavg_weights_by_loss(q: float) -> None:
    rate, losses = 0.2, [0.1, 2.0, 0.7]
    strategy, base = make("QFedAvg", q=str(q), learningRate=str(rate)), model()
    for number in range(2):
        contributions = with_scalar(updates(base, 3, seed=number), "loss", losses)
        numerator, denominator = np.zeros((3, 4)), 0.0
        for update, move, loss in zip(contributions, changes(contributions, base["w"]), losses, strict=True):
            step = -move / rate
            numerator += update.num_examples * loss**q * step
            denominator += update.num_examples * (q * loss ** (q - 1) * np.sum(step**2) + loss**q / rate)
        result = run(strategy, base, contributions)
        np.testing.assert_allclose(
            array(result["w"]), array(base["w"]) - numerator / denominator, rtol=1e-4, atol=1e-6
        )  # fmt: skip
        if q == 0:
            np.testing.assert_allclose(array(result["w"]), weighted_mean(contributions, "w"), rtol=1e-5, atol=1e-6)
        base = result


@pytest.mark.parametrize("q", [5.0, 40.0, 1000.0])
def test_powers_of_any_losses_have_a_quotient(q: float) -> None:
    """Comparison with the formula in fractions of the largest power."""
    rate, losses = 0.2, [1e-10, 1e80, 3e80, 1e-300, 2.0]
    base = model()
    for some in ([0], [0, 3], [4, 0], [0, 1, 2, 3, 4], [2, 1, 0], [1, 0, 4]):
        everything = with_scalar(updates(base, 5, seed=1), "loss", losses)
        contributions = [everything[index] for index in some]
        floored = [max(update.scalars["loss"], 1e-10) for update in contributions]
        powers = [math.exp(q * (math.log(loss) - math.log(max(floored)))) for loss in floored]
        numerator, denominator = np.zeros((3, 4)), 0.0
        for update, move, loss, power in zip(
            contributions, changes(contributions, base["w"]), floored, powers, strict=True
        ):
            step = -move / rate
            numerator += update.num_examples * power * step
            denominator += update.num_examples * power * (q / loss * np.sum(step**2) + 1 / rate)
        result = run(make("QFedAvg", q=str(q), learningRate=str(rate)), base, contributions)
        np.testing.assert_allclose(array(result["w"]), array(base["w"]) - numerator / denominator, rtol=1e-4, atol=1e-6)


FURTHEST = {"FedNova": ("steps", [1e-9, 1e9]), "SCAFFOLD": ("travel", [1e-9, 1e9]), "QFedAvg": ("loss", [0.0, 1e308])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("algorithm", [*FURTHEST, "FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedDyn"])
def test_no_number_that_is_let_through_makes_infinity(algorithm: str, dtype: torch.dtype) -> None:
    name, ends = FURTHEST.get(algorithm, ("loss", [1.0]))
    strategy = make(algorithm, clients=70)
    for order in ([0, -1], [-1, 0]):
        base: State = {"w": torch.full((3,), -(2.0**60), dtype=dtype)}
        strategy.begin(base)
        for number in range(70):
            scalars = {name: ends[order[number % 2]]}
            assert strategy.problem_with(scalars) is None
            tensors = {"w": torch.full((3,), 2.0**60 * (-1) ** (number // 2), dtype=dtype)}
            strategy.accept(Update(f"p/{number}", 2**53 if number % 3 else 1, tensors, scalars=scalars))
        assert non_finite(strategy.finish()) is None
        assert non_finite(strategy.state() | strategy.companion()) is None


def test_an_update_that_cannot_be_folded_does_not_count() -> None:
    base = model()
    contributions = with_scalar(updates(base, 3, seed=1), "steps", [1.0, 4.0, 10.0])
    for algorithm in ("FedNova", "QFedAvg", "FedBuff"):
        scalars = {"loss": 1.0, "steps": 2.0}
        good = [replace(update, scalars=scalars) for update in contributions]
        strategy = make(algorithm)
        strategy.begin(base)
        strategy.accept(good[0])
        with pytest.raises((KeyError, AttributeError)):
            strategy.accept(replace(good[1], scalars={} if algorithm != "FedBuff" else scalars, tensors={}))
        strategy.accept(good[2])
        assert torch.equal(strategy.finish()["w"], run(make(algorithm), base, [good[0], good[2]])["w"])


@pytest.mark.parametrize(
    ("scalars", "problem"),
    [
        ({}, "FedNova needs steps from every client, and the update has none"),
        ({"steps": 0.0}, "steps must be from 1e-09 to 1e+09, not 0.0"),
        ({"steps": -3.0}, "steps must be from 1e-09 to 1e+09, not -3.0"),
        ({"steps": float("nan")}, "steps must be from 1e-09 to 1e+09, not nan"),
        ({"steps": float("inf")}, "steps must be from 1e-09 to 1e+09, not inf"),
        ({"steps": 1e-300}, "steps must be from 1e-09 to 1e+09, not 1e-300"),
        ({"steps": 1e300}, "steps must be from 1e-09 to 1e+09, not 1e+300"),
        ({"steps": 2.0}, None),
    ],
)
def test_bad_scalars_are_refused(scalars: dict[str, float], problem: str | None) -> None:
    assert make("FedNova").problem_with(scalars) == problem


@pytest.mark.parametrize("deterministic", [False, True])
def test_qfedavg_wants_losses_from_zero_up(deterministic: bool) -> None:
    spec = Spec.model_validate({"algorithm": "QFedAvg", "deterministic": deterministic})
    strategy = make_strategy(spec)
    negative = "QFedAvg takes powers of losses, which must be at least 0, not -0.5"
    assert strategy.problem_with({"loss": -0.5}) == negative
    assert strategy.problem_with({}) == "QFedAvg needs loss from every client, and the update has none"
    assert "loss must be from 0 to " in (strategy.problem_with({"loss": float("nan")}) or "")
    assert "loss must be from 0 to " in (strategy.problem_with({"loss": float("inf")}) or "")
    for loss in (0.0, 1e-10, 1e300):
        assert strategy.problem_with({"loss": loss}) is None
