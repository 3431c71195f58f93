"""FedNova and q-FedAvg against their papers' formulas in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.strategies import Update

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
        # What is not trained is averaged as ever.
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


@pytest.mark.parametrize(
    ("scalars", "problem"),
    [
        ({}, "FedNova needs steps from every client, and the update has none"),
        ({"steps": 0.0}, "steps must be a finite number above 0, not 0.0"),
        ({"steps": -3.0}, "steps must be a finite number above 0, not -3.0"),
        ({"steps": float("nan")}, "steps must be a finite number above 0, not nan"),
        ({"steps": float("inf")}, "steps must be a finite number above 0, not inf"),
        ({"steps": 2.0}, None),
    ],
)
def test_bad_scalars_are_refused(scalars: dict[str, float], problem: str | None) -> None:
    assert make("FedNova").problem_with(scalars) == problem
