"""Stage times: measurement by clients, and checks by the aggregator."""

import math

import pytest

from isthmus.aggregator.telemetry.stage_times import StageTimes, sanitize
from isthmus.client.session.stage_timer import StageTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_client_reports_the_time_of_each_stage_since_its_last_update() -> None:
    clock = Clock()
    stages = StageTimer(clock)
    for stage, seconds in (("pulling", 3.0), ("evaluating", 1.0), ("training", 2.0), ("encoding", 8.0)):
        clock.now += seconds
        stages.enter(stage)
    clock.now += 0.5
    assert stages.current == "encoding"
    assert stages.take() == {"wait": 3.0, "pull": 1.0, "evaluate": 2.0, "train": 8.0, "encode": 0.5}
    # The push is not reported: the aggregator measures it.
    stages.enter("pushing")
    clock.now += 5.0
    stages.enter("waiting")
    clock.now += 1.0
    assert stages.take() == {"encode": 0.0, "wait": 1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_impossible_times_are_ignored(value: float) -> None:
    assert sanitize({"train": value, "pull": 2.0, "made-up": 1.0}) == {"pull": 2.0}


def test_means_and_maxima() -> None:
    times = StageTimes()
    for seconds in (1.0, 2.0, 6.0):
        times.add("train", seconds)
    times.add("fold", 0.25)
    assert times.summary() == {"train": {"mean": 3.0, "max": 6.0}, "fold": {"mean": 0.25, "max": 0.25}}
