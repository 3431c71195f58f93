"""When a job is good enough."""

import pytest

from isthmus.aggregator.progress import Progress
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
