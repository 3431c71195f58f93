"""Statistics of a round in its record and in the metrics."""

import math

from isthmus.aggregator.storage.round_record import RoundRecord
from isthmus.aggregator.telemetry.metrics import AggregatorMetrics
from isthmus.aggregator.telemetry.round_statistics import RoundStatistics
from isthmus_contracts.pb import federation_pb2 as pb


def header(pool: str, index: int, digest: str = "base", **seconds: float) -> pb.UpdateHeader:
    return pb.UpdateHeader(pool=pool, index=index, base_digest=digest, seconds=seconds)


def test_each_counted_update_is_added_once() -> None:
    metrics = AggregatorMetrics("team", "job")
    statistics = RoundStatistics(metrics)
    statistics.sent("cloud", "None", 7)  # before the round
    statistics.begin()
    statistics.sent("cloud", "None", 100)
    statistics.received("cloud", "Delta+Int8", 25, 0.5)
    statistics.submitted(header("cloud", 0, train=2.0, wait=1.0))
    statistics.submitted(header("cloud", 0, train=2.0, wait=1.0))  # submitted again, after it could not be kept
    statistics.submitted(header("lumi", 0, train=4.0, wait=math.nan), staleness=2)
    statistics.submitted(header("lumi", 1, train=9.0))
    statistics.withdrawn(header("lumi", 1))  # it could not be kept
    statistics.folded("cloud", 0.25)
    statistics.checkpointed(0.125)
    record = RoundRecord(3, 1.0, 2, 10)
    a, b, c, d = ("cloud", 0), ("lumi", 0), ("lumi", 1), ("lumi", 2)
    statistics.close(record, selected={a, b, c, d}, completed={a, b}, lost={a, c})
    assert (record.selected, record.late, record.failed) == (4, 1, 1)
    assert record.pools == {"cloud": 1, "lumi": 1}
    assert (record.received_bytes, record.sent_bytes) == (25, 100)
    assert record.stages == {
        "push": {"mean": 0.5, "max": 0.5},
        "fold": {"mean": 0.25, "max": 0.25},
        "checkpoint": {"mean": 0.125, "max": 0.125},
        "train": {"mean": 3.0, "max": 4.0},
        "wait": {"mean": 1.0, "max": 1.0},
    }

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"namespace": "team", "job": "job", **labels})

    assert value("isthmus_stage_seconds_sum", stage="train", pool="lumi") == 4.0
    assert value("isthmus_stage_seconds_count", stage="train", pool="cloud") == 1.0
    assert value("isthmus_stage_seconds_count", stage="checkpoint", pool="") == 1.0
    assert value("isthmus_update_staleness_rounds_sum", pool="lumi") == 2.0
    assert value("isthmus_update_staleness_rounds_count", pool="lumi") == 1.0
    assert value("isthmus_clients_selected_total", pool="lumi") == 3.0
    assert value("isthmus_clients_finished_total", pool="cloud", state="completed") == 1.0
    assert [value("isthmus_clients_finished_total", pool="lumi", state=state) for state in ("late", "failed")] == [1, 1]
    assert value("isthmus_sent_bytes_total", pool="cloud", codec="None") == 107.0
    assert value("isthmus_received_bytes_total", pool="cloud", codec="Delta+Int8") == 25.0
