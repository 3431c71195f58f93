"""Each round is returned once, in order, as soon as its result is complete."""

import json
from pathlib import Path

import pytest

from isthmus.local.round_records import RoundRecords
from isthmus_contracts.api.federated_job import Objective
from isthmus_contracts.pb import federation_pb2 as pb


class Aggregator:
    """Aggregator that writes records and reports statuses."""

    def __init__(self, directory: Path, told: int = 0) -> None:
        self.file = directory / "rounds.jsonl"
        self.book = RoundRecords(self.file, Objective(), told)

    def record(self, number: int, **metrics: float) -> None:
        item = {"round": number, "seconds": 0.5, "updates": 2, "examples": 10, "metrics": metrics}
        with self.file.open("a") as file:
            file.write(json.dumps(item) + "\n")

    def status(self, completed: int, complete: bool = False, **measured: tuple[int, float]) -> list[tuple[int, float]]:
        phase = pb.FederationStatus.COMPLETE if complete else pb.FederationStatus.TRAINING
        metrics = [pb.MetricValue(name=name, round=number, value=value) for name, (number, value) in measured.items()]
        status = pb.FederationStatus(phase=phase, completed_rounds=completed, metrics=metrics)
        return [(done.number, done.metrics.get("accuracy", -1.0)) for done in self.book.follow(status)]


@pytest.fixture
def aggregator(tmp_path: Path) -> Aggregator:
    return Aggregator(tmp_path)


def test_a_round_waits_for_the_measurement_of_its_model(aggregator: Aggregator) -> None:
    assert aggregator.status(0) == []
    aggregator.record(1, train_loss=1.0)
    assert aggregator.status(1) == []
    assert aggregator.status(1, accuracy=(1, 0.5)) == [(1, 0.5)]
    assert aggregator.status(1, accuracy=(1, 0.5)) == []


def test_a_round_without_a_measurement_is_returned_when_the_next_one_ends(aggregator: Aggregator) -> None:
    aggregator.record(1)
    aggregator.record(2)
    assert aggregator.status(2) == [(1, -1.0)]
    assert aggregator.status(2, complete=True) == [(2, -1.0)]


def test_rounds_that_the_status_passed_over_come_from_the_records(aggregator: Aggregator) -> None:
    for number in (1, 2, 3):
        aggregator.record(number)
        aggregator.record(number, accuracy=number / 10)
    assert aggregator.status(3) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_round_is_not_returned_before_the_aggregator_reports_it_complete(aggregator: Aggregator) -> None:
    aggregator.record(1, accuracy=0.5)
    assert aggregator.status(0) == []


def test_a_resumed_run_returns_only_new_rounds(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path, told=2)
    for number in (1, 2, 3):
        aggregator.record(number, accuracy=0.5)
    assert aggregator.status(3) == [(3, 0.5)]


def test_torn_lines_are_passed_over_and_finished_later(aggregator: Aggregator) -> None:
    aggregator.file.write_text("{broken}\n[]\n")
    assert aggregator.status(1) == []
    whole = json.dumps({"round": 1, "seconds": 0.5, "updates": 2, "metrics": {"accuracy": 0.5}}) + "\n"
    with aggregator.file.open("a") as file:
        file.write(whole[:20])
        file.flush()
        assert aggregator.status(1) == []
        file.write(whole[20:])
    assert aggregator.status(1) == [(1, 0.5)]
