"""TensorBoard's and MLflow's own readers find what a run wrote; and a server that is away stops nothing."""

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.aggregator.storage.round_record import RoundRecord
from isthmus.aggregator.telemetry.tracking.tracker import numbers_of

from .conftest import UID, Federation, eventually

Make = Callable[..., Federation]


def test_real_sinks(
    federation: Make,
    script: Path,
    tmp_path: Path,
    require: Callable[[bool, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As documented, with nothing set for MLflow."""
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    try:
        from mlflow.tracking import MlflowClient
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        require(False, f"{error}: pip install tensorboard tensorboardX mlflow-skinny")
    uri = (tmp_path / "mlruns").as_uri()
    tracking = {"tensorBoard": {}, "mlflow": {"trackingUri": uri, "experiment": "digits"}}
    job = federation(2, 6, tracking=tracking, objective={"metric": "score"})
    job.start_aggregator()
    clients = [job.start_client(script, index, PAUSE="0.1", HOLD="5") for index in range(2)]
    job.wait_for_round(4)  # the fifth waits
    # MLflow itself writes its files in place: a kill while it does so leaves some that cannot be read.
    eventually("MLflow has all of round 4", lambda: _has_metrics_of_round(4, job.state, tmp_path / "mlruns"))
    job.kill_aggregator()  # SIGKILL; the MLflow run is resumed
    job.start_aggregator()
    job.let_go()
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    lines = (job.state / "rounds.jsonl").read_text().splitlines()
    records = {record["round"]: record for record in map(json.loads, lines)}

    accumulator = EventAccumulator(str(job.state / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    losses = {event.step: event.value for event in accumulator.Scalars("train_loss")}
    scores = {event.step: event.value for event in accumulator.Scalars("score")}
    for number in (5, 6):
        assert losses[number] == pytest.approx(records[number]["metrics"]["train_loss"])
        assert scores[number] == pytest.approx(2 / 3)
    assert {event.value for event in accumulator.Scalars("round/updates")} == {2.0}

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the reader below
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "job")
    assert run.data.params["strategy"] == "FedAvg"
    assert run.data.params["config.rate"] == "0.1"
    assert run.data.tags["isthmus.job_uid"] == UID
    assert run.data.tags["model.sha256"] == status.model.sha256
    assert run.data.tags["model.uri"] == (job.state / "model.safetensors").as_uri()
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train_loss")}
    assert history == {number: pytest.approx(record["metrics"]["train_loss"]) for number, record in records.items()}


def _has_metrics_of_round(number: int, state: Path, runs: Path) -> bool:
    """Return True if MLflow's file store contains all metrics of a round's record."""
    lines = (state / "rounds.jsonl").read_text().splitlines(keepends=True)
    records = [RoundRecord.of_text(line) for line in lines if line.endswith("\n")]
    names = {name for record in records if record.round == number for name in numbers_of(record)}
    written = [directory for directory in runs.glob("*/*/metrics") if directory.is_dir()]
    return bool(names and written) and all(
        (file := written[0] / name).exists() and file.read_text().endswith(f" {number}\n") for name in names
    )


def test_a_server_that_is_away_stops_nothing(federation: Make, script: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but not listening
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        job = federation(1, 100_000, tracking={"mlflow": {"trackingUri": uri}})
        job.start_aggregator()
        job.start_client(script, PAUSE="0.05")
        status = job.wait_for(lambda status: "MLflow does not accept metrics" in status.message)
        job.wait_for_round(status.completed_rounds + 3)
        assert job.log("aggregator").count("MLflow does not accept metrics") == 1
        assert job.aggregator is not None
        job.aggregator.send_signal(signal.SIGTERM)
        assert job.aggregator.wait() == 143
        assert "entries were not written" in job.log("aggregator")
