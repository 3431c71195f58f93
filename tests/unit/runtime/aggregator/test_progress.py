"""The objective's target, and the best model of a job."""

from typing import Any

import pytest

from isthmus.aggregator.state.confirmation import ClientMeasurements, confirmed
from isthmus.aggregator.state.metrics_by_round import MOST_NAMES, Progress, WeightedMeans
from isthmus.aggregator.storage.round_record import RoundRecord
from isthmus_contracts.api.federated_job import Objective

NAN = float("nan")


def progress(**objective: str) -> Progress:
    return Progress(Objective.model_validate(objective))


@pytest.mark.parametrize(
    ("objective", "values", "reached"),
    [
        ({}, [0.99], None),
        ({"target": "0.9"}, [], None),
        ({"target": "0.9"}, [0.5, 0.89], None),
        ({"target": "0.9"}, [0.5, 0.9, 0.7], 1),
        ({"metric": "loss", "goal": "Minimize", "target": "1e-1"}, [0.5, 0.2], None),
        ({"metric": "loss", "goal": "Minimize", "target": "1e-1"}, [0.5, 0.1], 1),
    ],
)
def test_the_target(objective: dict[str, str], values: list[float], reached: int | None) -> None:
    job = progress(**objective)
    for number, value in enumerate(values):
        job.take(number, {job.objective.metric: value, "other": 5.0}, value)
    assert job.reached == reached


def test_an_unconfirmed_target_is_not_met_and_noted() -> None:
    job = progress(target="0.9")
    job.take(3, {"accuracy": 0.95}, 0.2)
    assert (job.reached, job.best.round) == (None, 3)
    assert job.note.startswith(
        "accuracy is 0.95 after round 3, which meets objective.target 0.9; but not more than half"
    )
    job.take(4, {"accuracy": 0.5}, 0.5)
    assert job.note == ""
    job.take(5, {"accuracy": 0.99})  # too few clients have measured it
    assert (job.reached, job.best.round) == (None, 3)


def test_the_newest_models_value_may_still_change() -> None:
    job = progress(target="0.9")
    job.take(1, {"accuracy": 0.6}, 0.6)
    job.take(2, {"accuracy": 0.95}, 0.95)
    assert (job.reached, job.best.round) == (2, 2)
    job.take(2, {"accuracy": 0.5}, 0.5)
    assert (job.reached, job.best.round, job.best.value) == (None, 1, 0.6)


def records(metric: str = "accuracy") -> list[RoundRecord]:
    values = {1: 0.5, 2: 0.8, 3: 0.7}
    return [RoundRecord(n, 1.0, 2, 20, {metric: v}, confirmed={metric: v}) for n, v in values.items()]


@pytest.mark.parametrize(
    ("available", "noted", "best", "reached"),
    [
        ({1, 2, 3}, None, 2, 3),
        ({1, 3}, None, 3, 3),  # a removed model cannot be the best
        ({1, 2}, None, 2, 2),
        ({1}, None, 1, None),
        ({1, 2, 3}, (2, 0.8), 2, 3),
        ({0, 3}, (0, 0.9), 0, 3),  # the record of the best round was lost
    ],
)
def test_a_restart(available: set[int], noted: Any, best: int, reached: int | None) -> None:
    job = progress(target="0.7")
    job.restore(records(), available, noted)
    assert (job.best.round, job.reached) == (best, reached)


def test_another_objective_after_a_restart() -> None:
    job = progress(metric="f1", target="0.1")
    job.restore(records(), {1, 2, 3})
    assert (job.best.name, job.reached) == ("", None)


@pytest.mark.parametrize(
    ("objective", "metrics", "note"),
    [
        ({}, {"score": 1.0}, ""),  # accuracy is only the default
        ({"metric": "score"}, {"score": 1.0}, ""),
        ({"metric": "acuracy"}, {"accuracy": 1.0, "loss": 0.1},
         "objective.metric: no client reports 'acuracy'; reported: accuracy, loss; did you mean accuracy?"),
        ({"target": "0.9"}, {"score": 1.0},
         "objective.metric: no client reports 'accuracy'; reported: score; objective.target is never met"),
        ({"target": "0.9"}, {},
         "objective.metric: no client reports 'accuracy'; reported: nothing; objective.target is never met"),
        ({"metric": "a"}, {"\x1b[31m": 1.0}, "objective.metric: no client reports 'a'; reported: [31m"),
    ],
)  # fmt: skip
def test_an_objective_that_is_not_reported(objective: dict[str, str], metrics: dict[str, float], note: str) -> None:
    job = progress(**objective)
    job.take(1, metrics)
    job.look_for_objective()
    assert job.note == note
    job.take(2, {job.objective.metric: 0.5})
    assert job.note == ""


@pytest.mark.parametrize(("goal", "partial", "whole"), [("Maximize", 1.0, 0.4), ("Minimize", 0.1, 0.7)])
def test_the_mean_of_all_clients_replaces_a_partial_one(goal: str, partial: float, whole: float) -> None:
    """Clients that only evaluate report later than those that train."""
    target = {"metric": "value", "goal": goal, "target": str(partial)}
    progress = Progress(Objective.model_validate(target))
    progress.take(1, {"value": 0.5}, 0.5)
    progress.take(2, {"value": partial}, partial)
    assert progress.reached == 2
    progress.take(2, {"value": whole}, whole)
    assert progress.reached is None
    assert (progress.best.round, progress.best.value) == (1, 0.5)
    progress.take(2, {"value": partial}, partial)
    assert (progress.best.round, progress.best.value) == (2, partial)


def test_a_client_without_examples_does_not_count() -> None:
    means = WeightedMeans()
    means.add(("pool", 0), 3, {"accuracy": 0.9})
    means.add(("pool", 1), 0, {"accuracy": 0.0, "alone": 1.0})
    assert means.means() == {"accuracy": pytest.approx(0.9)}
    assert means.clients() == {("pool", 0), ("pool", 1)}


def test_means_are_finite() -> None:
    """JSON has no NaN and no infinity."""
    means = WeightedMeans()
    means.add(("pool", 0), 3, {"loss": 1.0, "nan": NAN, "huge": 1e308})
    means.add(("pool", 1), 1, {"loss": 5.0, "huge": 1e308})
    assert means.means() == {"loss": 2.0}


def test_weights_may_be_fractions_or_zero() -> None:
    means = WeightedMeans()
    means.add(("pool", 0), 0.25, {"accuracy": 0.0})
    means.add(("pool", 1), 0.75, {"accuracy": 1.0})
    means.add(("pool", 2), 0, {"accuracy": 1e9, "alone": 1.0})
    assert means.means() == {"accuracy": 0.75}
    assert means.of("accuracy") == {("pool", 0): 0.0, ("pool", 1): 1.0}


def test_a_robust_mean_is_a_median() -> None:
    means = WeightedMeans(robust=True)
    for index, value in enumerate((0.1, 0.2, 1e300)):
        means.add(("pool", index), 2.0**53, {"accuracy": value})
    assert means.means() == {"accuracy": 0.2}


@pytest.mark.parametrize(
    ("goal", "mean", "own", "asked", "least"),
    [
        ("Maximize", 0.9, [0.9], 1, 0.9),
        ("Maximize", 0.85, [0.8, 0.9], 2, 0.8),  # both clients
        ("Maximize", 0.86, [0.8, 0.85, 0.93], 3, 0.85),
        ("Maximize", 0.84, [0.8, 0.85, 0.93], 3, 0.84),  # never more than the metric
        ("Maximize", 1.0, [1.0, 0.1, 0.1], 3, 0.1),  # one false report
        ("Maximize", 1e9, [1e9, 1e9, 0.1, 0.1], 4, 0.1),  # half of the reports are false
        ("Maximize", 1.0, [1.0], 3, None),  # the others have not answered
        ("Maximize", 1.0, [1.0, 1.0], 3, 1.0),
        ("Maximize", 1.0, [1.0, 1.0], 4, None),
        ("Maximize", 1.0, [1.0, NAN, NAN], 3, None),
        ("Maximize", 1.0, [], 0, None),
        ("Minimize", 0.2, [0.1, 0.2, 0.9], 3, 0.2),
        ("Minimize", 0.0, [0.0, 0.9, 0.9], 3, 0.9),
    ],
)
def test_the_bound_that_most_clients_confirm(
    goal: str, mean: float, own: list[float], asked: int, least: float | None
) -> None:
    assert confirmed(mean, own, asked, Objective.model_validate({"goal": goal})) == least


def ids(*numbers: int) -> set[tuple[str, int]]:
    return {("pool", number) for number in numbers}


def heard(values: dict[int, float | None]) -> WeightedMeans:
    means = WeightedMeans()
    for number, value in values.items():
        means.add(("pool", number), 1.0, {} if value is None else {"accuracy": value})
    return means


def test_clients_that_measure_another_metric_do_not_count() -> None:
    measurements = ClientMeasurements(Objective(), few=False)
    means = heard({0: 0.9, 1: None, 2: None, 3: None})
    assert measurements.confirmed(means, ["accuracy"], 0.9, ids(0, 1, 2, 3), ids(0, 1, 2, 3)) == 0.9


def test_if_one_client_measures_a_model_the_newest_values_of_others_count() -> None:
    measurements, everybody = ClientMeasurements(Objective(), few=False), ids(0, 1, 2)
    assert measurements.confirmed(heard({0: 1.0}), ["accuracy"], 1.0, ids(0), everybody) is None
    assert measurements.confirmed(heard({1: 0.2}), ["accuracy"], 0.2, ids(1), everybody) == 0.2
    assert measurements.confirmed(heard({0: 1.0}), ["accuracy"], 1.0, ids(0), everybody) == 0.2
    assert measurements.confirmed(heard({2: 0.8}), ["accuracy"], 0.8, ids(2), everybody) == 0.8


def test_asynchronous_rounds_count_all_clients() -> None:
    measurements, everybody = ClientMeasurements(Objective(), few=True), ids(0, 1, 2, 3, 4)
    assert measurements.confirmed(heard({0: 1.0, 1: 1.0}), ["accuracy"], 1.0, ids(0, 1), everybody) is None
    assert measurements.confirmed(heard({2: 0.7, 3: 0.9}), ["accuracy"], 0.8, ids(2, 3), everybody) == 0.8


def test_names_are_bounded_over_a_jobs_life() -> None:
    job = progress()
    for number in range(20):
        means = job.admit({f"m{number}.{i}": 1.0 for i in range(256)})
        job.take(number, means)
    assert len(job.newest) == MOST_NAMES
    # Known names continue, and so does the objective's metric.
    assert job.admit({"new": 1.0, "accuracy": 0.5, "m0.7": 2.0}) == {"accuracy": 0.5, "m0.7": 2.0}


def test_names_of_a_single_client_are_left_out_first() -> None:
    job, means = progress(), WeightedMeans()
    for index in range(8):
        means.add(("evil", index), 1, {f"a{index}.{i}": 0.0 for i in range(256)})
    for index in range(2):
        means.add(("good", index), 1, {"loss": 1.0, "recall": 0.5})
    admitted = job.admit(means.means())
    assert len(admitted) == MOST_NAMES and admitted["loss"] == 1.0 and admitted["recall"] == 0.5
