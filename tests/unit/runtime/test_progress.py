"""When a job is good enough."""

import pytest

from isthmus.aggregator.progress import MOST_NAMES, Progress, WeightedMeans
from isthmus_contracts.federatedjob import Objective


@pytest.mark.parametrize(
    ("objective", "values", "reached"),
    [
        ({}, [0.99], False),
        ({"target": "0.9"}, [], False),
        ({"target": "0.9"}, [0.5, 0.89], False),
        ({"target": "0.9"}, [0.5, 0.9, 0.7], True),
        ({"metric": "loss", "goal": "Minimize", "target": "1e-1"}, [0.5, 0.2], False),
        ({"metric": "loss", "goal": "Minimize", "target": "1e-1"}, [0.5, 0.1], True),
    ],
)
def test_the_target(objective: dict[str, str], values: list[float], reached: bool) -> None:
    progress = Progress(Objective.model_validate(objective))
    for number, value in enumerate(values):
        progress.take(number, {progress.objective.metric: value, "other": 5.0})
    assert progress.reached is reached


@pytest.mark.parametrize(("goal", "partial", "whole"), [("Maximize", 1.0, 0.4), ("Minimize", 0.1, 0.7)])
def test_what_all_clients_measured_replaces_what_some_did(goal: str, partial: float, whole: float) -> None:
    """The clients that only evaluate come later than those that train."""
    target = {"metric": "value", "goal": goal, "target": str(partial)}
    progress = Progress(Objective.model_validate(target))
    progress.take(1, {"value": 0.5})
    progress.take(2, {"value": partial})
    assert progress.reached
    progress.take(2, {"value": whole})
    assert not progress.reached
    assert (progress.best.round, progress.best.value) == (1, 0.5)
    progress.take(2, {"value": partial})
    assert (progress.best.round, progress.best.value) == (2, partial)


def test_a_client_without_examples_does_not_count() -> None:
    means = WeightedMeans()
    means.add(("pool", 0), 3, {"accuracy": 0.9})
    means.add(("pool", 1), 0, {"accuracy": 0.0, "alone": 1.0})
    assert means.means() == {"accuracy": pytest.approx(0.9)}
    assert means.clients() == {("pool", 0), ("pool", 1)}


def test_means_are_numbers() -> None:
    """JSON has no others."""
    means = WeightedMeans()
    means.add(("pool", 0), 3, {"loss": 1.0, "nan": float("nan"), "huge": 1e308})
    means.add(("pool", 1), 1, {"loss": 5.0, "huge": 1e308})
    assert means.means() == {"loss": 2.0}


def test_names_are_bounded_over_a_jobs_life() -> None:
    progress = Progress(Objective.model_validate({"metric": "accuracy"}))
    for number in range(20):
        means = progress.admit({f"m{number}.{i}": 1.0 for i in range(256)})
        progress.take(number, means)
    assert len(progress.newest) == MOST_NAMES
    # What is known goes on, and so does what the job is about.
    assert progress.admit({"new": 1.0, "accuracy": 0.5, "m0.7": 2.0}) == {"accuracy": 0.5, "m0.7": 2.0}


def test_the_names_of_one_client_are_the_first_to_be_left_out() -> None:
    progress, means = Progress(Objective.model_validate({"metric": "accuracy"})), WeightedMeans()
    for index in range(8):
        means.add(("evil", index), 1, {f"a{index}.{i}": 0.0 for i in range(256)})
    for index in range(2):
        means.add(("good", index), 1, {"loss": 1.0, "recall": 0.5})
    admitted = progress.admit(means.means())
    assert len(admitted) == MOST_NAMES and admitted["loss"] == 1.0 and admitted["recall"] == 0.5
