"""The final status always fits the kubelet's limit, and contains the reason why a job failed."""

import pytest

from isthmus.aggregator.termination import MOST_BYTES, termination_message
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_operator.state.aggregator_status import from_termination

FAILED = pb.FederationStatus.FAILED


def metrics(count: int, length: int = 20) -> list[pb.MetricValue]:
    return [pb.MetricValue(name=f"m{i}".ljust(length, "x"), value=0.123456789 * i, round=3) for i in range(count)]


@pytest.mark.parametrize("count", [0, 10, 60, 1024])
@pytest.mark.parametrize("message", ["round 3 came to NaN", "\u00e4" * 900, "\U0001f600" * 5000, '"\\' * 3000])
@pytest.mark.parametrize("pools", [0, 3, 64])
def test_the_reason_is_always_included(count: int, message: str, pools: int) -> None:
    failures = [pb.ClientFailure(index=i, message="ValueError: no", traceback="t" * 2000) for i in range(5)]
    status = pb.FederationStatus(
        phase=FAILED, message=message, metrics=metrics(count, 128),
        pools=[pb.PoolStatus(name="p" * 60 + str(i), failures=failures) for i in range(pools)],
    )  # fmt: skip
    text = termination_message(status)
    assert len(text.encode()) <= MOST_BYTES
    read = from_termination(text)
    assert read is not None and read.phase == "FAILED"
    assert read.message[:19] == message[:19]


def test_metrics_are_left_out_first() -> None:
    pools = [pb.PoolStatus(name="cloud", connected=2, failures=[pb.ClientFailure(message="boom", traceback="boom")])]
    read = from_termination(termination_message(pb.FederationStatus(phase=FAILED, metrics=metrics(60), pools=pools)))
    assert read is not None
    assert (read.metrics, read.connected, read.failures) == ((), {"cloud": 2}, {"cloud": "boom"})


def test_a_status_that_fits_is_unchanged() -> None:
    read = from_termination(termination_message(pb.FederationStatus(phase=FAILED, metrics=metrics(10))))
    assert read is not None and len(read.metrics) == 10
