"""Tracking sinks: failures, and the numbers that they receive."""

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from isthmus.aggregator.job import Job
from isthmus.aggregator.storage.round_record import RoundRecord
from isthmus.aggregator.telemetry.tracking.sink import Sink, Worker
from isthmus.aggregator.telemetry.tracking.tensorboard import TensorBoardSink
from isthmus.aggregator.telemetry.tracking.tracker import Tracker, numbers_of, parameters_of
from isthmus_contracts.manifests.manifest import parse_spec

LONG = 60.0


class Recorder(Sink):
    """Fails the given number of times, then records its calls."""

    name = "Recorder"
    requirement = "nothing"

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.written: list[tuple[int, dict[str, float]]] = []
        self.finished: list[tuple[bool, Mapping[str, str]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> None:
        self.gate.wait(LONG)

    def write(self, round_number: int, time: float, values: Mapping[str, float]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody there\nand more lines")
        self.written.append((round_number, dict(values)))

    def finish(self, succeeded: bool, tags: Mapping[str, str]) -> None:
        self.finished.append((succeeded, tags))


def test_each_number_is_sent_once() -> None:
    sink = Recorder()
    tracker = Tracker([sink])
    record = RoundRecord(1, 0.5, 2, 10, {"train_loss": 1.0}, 7.0, stages={"train": {"mean": 2.0, "max": 3.0}})
    tracker.take(record)
    record.metrics["accuracy"] = 0.5
    tracker.take(record)
    tracker.take(record)
    tracker.take(RoundRecord(2, 0.5, 2, 10, {"train_loss": 0.5}))
    tracker.finish(Path("/state/model.safetensors"), "abc")
    tracker.close(LONG)
    (first, all_values), (second, new_values), (third, _) = sink.written
    assert (first, second, third) == (1, 1, 2)
    assert all_values["train_loss"] == 1.0
    assert all_values["round/train_seconds"] == 2.0
    assert new_values == {"accuracy": 0.5}
    assert sink.finished == [(True, {"model.sha256": "abc", "model.uri": "file:///state/model.safetensors"})]


def test_a_failing_sink_is_retried_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sink, seen = Recorder(failures=3), threading.Event()
    worker = Worker(sink, retry_seconds=0.01)
    with caplog.at_level(logging.INFO):
        worker.put(lambda sink: sink.write(1, 0.0, {"a": 1.0}))
        worker.put(lambda sink: seen.set())
        assert seen.wait(LONG)
        worker.close(LONG)
    assert sink.written == [(1, {"a": 1.0})]
    assert worker.note == ""
    assert [record.message for record in caplog.records] == [
        "Recorder does not accept metrics: ConnectionError: nobody there; trying again",
        "Recorder accepts metrics again",
    ]


def test_a_missing_library_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    tracker = Tracker([TensorBoardSink(tmp_path)])
    for number in range(5):
        tracker.take(RoundRecord(number, 0.5, 2, 10))
    tracker.close(LONG)
    (note,) = tracker.notes
    assert note.startswith("TensorBoard is off: ")
    assert note.endswith("(pip install 'isthmus[tensorboard]')")
    assert sum("TensorBoard is off" in record.message for record in caplog.records) == 1


def test_entries_beyond_the_queue_are_dropped_without_waiting(caplog: pytest.LogCaptureFixture) -> None:
    sink = Recorder()
    sink.gate.clear()
    worker = Worker(sink, backlog=2)

    def work(number: int) -> Callable[[Sink], None]:
        return lambda sink: sink.write(number, 0.0, {})

    for number in range(10):
        worker.put(work(number))
    worker.close(0.1)  # it hangs and is abandoned
    sink.gate.set()
    assert any("entries were not written" in record.message for record in caplog.records)


def test_the_privacy_cost_of_a_round() -> None:
    private = {"epsilon": 2.5, "delta": 1e-5, "rounds": 3, "mu_squared": 0.1, "clipped_ratio": 0.25}
    numbers = numbers_of(RoundRecord(3, 1.0, 2, 20, privacy=private))
    assert (numbers["round/epsilon"], numbers["round/clipped_ratio"]) == (2.5, 0.25)
    assert not {"round/epsilon", "round/delta"} & set(numbers_of(RoundRecord(3, 1.0, 2, 20)))


def test_a_private_jobs_parameters() -> None:
    private = {
        "differentialPrivacy": {"clipNorm": "0.5", "noiseMultiplier": "2", "adaptiveClipping": {"quantile": "0.8"}}
    }
    pools = [{"name": "cloud", "replicas": 2, "cloud": {}}]
    spec = parse_spec({"rounds": 1, "task": {"image": "i", "command": ["x"]}, "pools": pools, "privacy": private})
    parameters = parameters_of(Job("job", "default", "uid", spec))
    told = {name: value for name, value in parameters.items() if name.startswith("privacy.")}
    assert told == {
        "privacy.clipNorm": "0.5", "privacy.noiseMultiplier": "2", "privacy.delta": "1e-5",
        "privacy.noise": "Aggregator", "privacy.adaptiveClipping.quantile": "0.8",
        "privacy.adaptiveClipping.learningRate": "0.2",
    }  # fmt: skip


def test_invalid_names_are_replaced() -> None:
    assert "f1_macro___x" in numbers_of(RoundRecord(1, 0.0, 1, 1, {"f1:macro:?(x": 1.0}))
