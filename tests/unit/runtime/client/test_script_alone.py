"""A training script outside a federation."""

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import isthmus
from isthmus.client.evaluation import measure
from isthmus.client.round import Round
from isthmus_contracts.pb import federation_pb2 as pb


def test_one_round_and_a_printed_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(1, 1)
    seen = []
    for rnd in isthmus.rounds(model, evaluate=lambda: {"accuracy": 0.5}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert rnd.wrap(optimizer) is optimizer
        assert not rnd.should_stop
        rnd.submit(num_examples=3, loss=0.1)
        seen.append((rnd.number, rnd.config))
    assert seen == [(1, {})]
    assert capsys.readouterr().out == "accuracy=0.5000\n"


def test_the_context_is_that_of_an_only_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_DATA", "/data")
    assert isthmus.context() == isthmus.Context(data="/data")


WRONG_COUNTS = [0, -1, 1.5, True, None, "5", float("nan"), float("inf"), 2**53 + 2, 10**400, torch.tensor([1, 2])]


@pytest.mark.parametrize("count", WRONG_COUNTS)
def test_a_wrong_number_of_examples_is_an_error_and_may_be_corrected(count: Any) -> None:
    rnd = next(iter(isthmus.rounds(torch.nn.Linear(1, 1))))
    with pytest.raises(ValueError, match=r"^num_examples must be a whole number of at least 1 .* not .{1,60}$"):
        rnd.submit(num_examples=count)
    assert not rnd.submitted
    rnd.submit(num_examples=5)
    assert rnd.submitted


@pytest.mark.parametrize("loss", [None, "0.5", [0.5], torch.ones(300, 2), 1j, 10**400])
def test_a_metric_that_is_no_number_is_named_and_may_be_corrected(loss: Any) -> None:
    rnd = next(iter(isthmus.rounds(torch.nn.Linear(1, 1))))
    with pytest.raises(ValueError, match=r"^loss must be a number, not .{1,60}$"):
        rnd.submit(num_examples=5, accuracy=0.5, loss=loss)
    rnd.submit(num_examples=5, accuracy=0.5, loss=0.1)


@pytest.mark.parametrize(
    "count",
    [5, 5.0, np.int64(5), np.float32(5), torch.tensor(5), torch.tensor([5.0]), np.array([5]), np.array([[5.0]])],
)
def test_numbers_of_any_kind(count: Any) -> None:
    handed_in: list[tuple[int, dict[str, float]]] = []
    rnd = Round(1, {}, _finish=lambda number, metrics: lambda: handed_in.append((number, metrics)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnd.submit(num_examples=count, loss=torch.tensor(0.5, requires_grad=True), diverged=float("nan"))
    assert handed_in == [(5, {"loss": 0.5, "diverged": pytest.approx(float("nan"), nan_ok=True)})]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.93, 'must return named numbers, like {"accuracy": 0.93}, not 0.93'),
        (None, 'must return named numbers, like {"accuracy": 0.93}, not None'),
        ({"loss": 0.1, "accuracy": None}, "must return named numbers: accuracy must be a number, not None"),
        ({"num_examples": float("nan")}, "num_examples must be from 0 (nothing to measure on) to 2**53, not nan"),
        ({"num_examples": float("inf")}, "num_examples must be from 0 (nothing to measure on) to 2**53, not inf"),
        ({"num_examples": -1}, "num_examples must be from 0 (nothing to measure on) to 2**53, not -1.0"),
        ({"num_examples": 2.0**54}, "num_examples must be from 0 (nothing to measure on) to 2**53, not 1.8"),
    ],
)
def test_an_evaluation_that_returns_no_named_numbers(returned: Any, message: str) -> None:
    with pytest.raises(isthmus.FederationError, match=re.escape(message)):
        for rnd in isthmus.rounds(torch.nn.Linear(1, 1), evaluate=lambda: returned):
            rnd.submit(num_examples=1)
    with pytest.raises(isthmus.FederationError, match=re.escape(message)):
        measure(lambda: returned, pb.Offer())


def test_an_evaluation_of_tensors_and_of_what_is_not_finite() -> None:
    returned = {"accuracy": torch.tensor(0.5), "loss": float("inf"), "num_examples": np.int64(7)}
    measured = measure(lambda: returned, pb.Offer(base_round=3, base_digest="of it"))
    assert measured == pb.Evaluation(
        model_round=3, model_digest="of it", num_examples=7, metrics={"accuracy": 0.5, "loss": float("inf")}
    )  # fmt: skip


@pytest.mark.parametrize("weight", [0, 0.25, 2**53])
def test_an_evaluations_weight_is_kept(weight: float) -> None:
    measured = measure(lambda: {"accuracy": 0.5, "num_examples": weight}, pb.Offer())
    assert (measured.num_examples, dict(measured.metrics)) == (weight, {"accuracy": 0.5})


def test_twice() -> None:
    rnd = next(iter(isthmus.rounds(torch.nn.Linear(1, 1))))
    rnd.submit(num_examples=1)
    with pytest.raises(RuntimeError, match="called twice; each round has its own rnd"):
        rnd.submit(num_examples=1)


def test_an_environment_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_ENDPOINT", "localhost:1")
    monkeypatch.setenv("ISTHMUS_INDEX", "first")
    with pytest.raises(ValueError, match="ISTHMUS_INDEX must be a whole number, not 'first'"):
        isthmus.context()
