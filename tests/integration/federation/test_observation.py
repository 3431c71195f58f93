"""Status, metrics and records of a run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.aggregator.telemetry.stage_times import CLIENT_STAGES, SERVER_STAGES
from isthmus_contracts.pb import federation_pb2 as pb

from .conftest import Federation, eventually
from .test_protocol import STATE, HandMadeClient

Make = Callable[..., Federation]


def value(metrics: str, name: str, **labels: str) -> float:
    """Return one sample, identified by some of its labels in any order."""
    for line in metrics.splitlines():
        match = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
        if match and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', match[1])).items():
            return float(match[2])
    return 0.0


def records(job: Federation) -> dict[int, dict[str, object]]:
    lines = (job.state / "rounds.jsonl").read_text().splitlines()
    return {record["round"]: record for record in map(json.loads, lines)}


def test_every_stage_is_measured_and_written_down(federation: Make, script: Path) -> None:
    job = federation(2, 4)
    job.start_aggregator()
    for index in range(2):
        job.start_client(script, index, BREAK="4:so that the aggregator stays")
    status = job.wait_for(lambda status: status.pools[0].failed == 2)
    assert status.completed_rounds == 3
    newest = {metric.name: metric.value for metric in status.metrics}

    def loss() -> bool:
        return value(job.metrics(), "isthmus_metric", metric="train_loss") == pytest.approx(newest["train_loss"])

    eventually("the gauges have followed", loss)
    metrics = job.metrics()
    for stage in CLIENT_STAGES:
        # Untrained weights are not evaluated.
        count = value(metrics, "isthmus_stage_seconds_count", stage=stage, pool="pool")
        assert count == (4 if stage == "evaluate" else 6), stage
    assert value(metrics, "isthmus_stage_seconds_count", stage="push", pool="pool") == 7  # the initial weights too
    assert value(metrics, "isthmus_stage_seconds_count", stage="fold", pool="pool") == 6
    assert value(metrics, "isthmus_stage_seconds_count", stage="checkpoint", pool="") >= 4
    assert value(metrics, "isthmus_clients_selected_total", pool="pool") == 6
    assert value(metrics, "isthmus_clients_finished_total", pool="pool", state="completed") == 6
    assert value(metrics, "isthmus_update_staleness_rounds_count", pool="pool") == 6
    assert value(metrics, "isthmus_update_staleness_rounds_sum", pool="pool") == 0
    for number, record in records(job).items():
        assert (record["selected"], record["late"], record["failed"]) == (2, 0, 0)
        assert record["pools"] == {"pool": 2}
        stages = record["stages"]
        assert isinstance(stages, dict)
        assert set(stages) == {*CLIENT_STAGES, *SERVER_STAGES} - ({"evaluate"} if number == 1 else set())
        assert all(0 <= seconds["mean"] <= seconds["max"] for seconds in stages.values())
        assert record["received_bytes"] == record["sent_bytes"] != 0  # raw: two models up, and two down


def test_a_straggler_is_late_and_one_that_is_gone_has_failed(federation: Make, script: Path) -> None:
    # The second round, which waits for the client that has left, keeps the aggregator running.
    job = federation(3, 2, stragglers={"minUpdates": 1, "roundDeadlineSeconds": 10})
    job.start_aggregator()
    job.start_client(script, 0)
    job.start_client(script, 1, PAUSE="600")
    job.start_client(script, 2, BREAK="1:no data")
    job.wait_for(lambda status: status.completed_rounds == 1)
    metrics = job.metrics()
    states = [value(metrics, "isthmus_clients_finished_total", state=s) for s in ("completed", "late", "failed")]
    assert states == [1, 1, 1]
    record = records(job)[1]
    assert (record["selected"], record["updates"], record["late"], record["failed"]) == (3, 1, 1, 1)


def test_a_clients_own_numbers_are_not_believed_blindly(federation: Make) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    client = HandMadeClient(job)
    try:
        client.offer()
        client.push(client.header(0))
        lies = {"train": float("nan"), "wait": -1.0, "pull": float("inf"), "evaluate": 1e300, "encode": 0.5, "x": 1.0}
        metrics = {"loss": float("nan"), "accuracy": float("inf"), "good": 1.5}
        header = client.header(1, client.offer().base_digest, seconds=lies, metrics=metrics)
        assert client.push(header).verdict == pb.PushReply.ACCEPTED
        eventually("training is complete", lambda: job.status().phase == pb.FederationStatus.COMPLETE)
    finally:
        client.close()
    job.wait_for_exit()
    record = records(job)[1]
    assert record["metrics"] == {"train_good": 1.5}
    assert set(record["stages"]) == {"encode", "push", "fold", "checkpoint"}  # type: ignore[call-overload]
    assert record["received_bytes"] == STATE["w"].nbytes
