"""When a job is good enough."""

import pytest

from isthmus.aggregator.progress import Progress, WeightedMeans
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


def test_means_are_numbers() -> None:
    """JSON has no others."""
    means = WeightedMeans()
    means.add(("pool", 0), 3, {"loss": 1.0, "nan": float("nan"), "huge": 1e308})
    means.add(("pool", 1), 1, {"loss": 5.0, "huge": 1e308})
    assert means.means() == {"loss": 2.0}
