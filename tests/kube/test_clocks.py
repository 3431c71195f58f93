"""Clocks that are wrong by hours, on a real API server and kubelet: no job ends too early, and none hangs."""

import datetime as dt
from collections.abc import Callable

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb
from tests.support import faketime

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, manifest

PODS = {"demo-aggregator", "demo-cloud-0-0", "demo-cloud-1-0"}
HOURS = [-3.0, 3.0]


def skew(operator: Operator) -> float:
    """Return the clock skew of its node that the operator reports, in seconds."""
    lines = operator.metrics().splitlines()
    found = next((line for line in lines if line.startswith("isthmus_operator_clock_skew_seconds ")), "x 0")
    return float(found.split()[1])


@pytest.mark.parametrize("hours", HOURS)
def test_an_operator_that_moves_to_a_node_whose_clock_is_wrong(
    namespace: Namespace, operator: Operator, hours: float, require: Callable[[bool, str], None]
) -> None:
    require(faketime.library() is not None, "libfaketime is not installed")
    namespace.apply(manifest(activeDeadlineSeconds=3600, ttlSecondsAfterFinished=3600, backoffLimit=3))
    eventually(lambda: namespace.running() >= PODS, "the pods run", 180)
    began = namespace.status()["startTime"]
    operator.kill()
    operator.environment = faketime.wrong_by(hours)
    operator.start()
    eventually(lambda: abs(skew(operator) - hours * 3600) < 60, "it knows that its clock is wrong")
    # The kubelet's clock differs from the operator's: the failed client restarts after seconds, not hours.
    namespace.touch("demo-cloud-0-0", "/tmp/fail")  # noqa: S108 - in the pod
    eventually(lambda: "demo-cloud-0-1" in namespace.running(), "it is started again")
    # Start a job and make its certificates now, by the cluster's clock.
    namespace.apply(manifest("other", cloud=1, activeDeadlineSeconds=3600))
    eventually(lambda: "other-cloud-0-0" in namespace.running(), "another job runs", 180)
    started = dt.datetime.fromisoformat(namespace.status("other")["startTime"])
    assert abs(started - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=10)
    assert namespace.status()["startTime"] == began
    assert "demo-aggregator" in namespace.running()
    namespace.touch("demo-aggregator", "/var/lib/isthmus/complete")
    namespace.until("Complete", "True/RoundsCompleted")
    # The deadline has not passed, by the correct clock or by the wrong one.
    operator.kill()
    operator.environment = {}
    operator.start()
    eventually(lambda: abs(skew(operator)) < 60, "the clock is right")
    namespace.until("Complete", "True/RoundsCompleted")
    assert namespace.condition("Failed") == ""


@pytest.mark.parametrize("hours", HOURS)
def test_a_site_whose_clock_is_wrong(
    namespace: Namespace, operator: Operator, bridge: FakeBridge, hours: float
) -> None:
    bridge.ahead = hours * 3600
    pool = FakeBridge.pool(namespace.name)
    pool["hpc"]["maxQueueSeconds"] = 3600
    pool["hpc"]["timeLimitSeconds"] = 7200
    job = manifest()
    job["spec"]["pools"].append(pool)
    namespace.apply(job)
    eventually(lambda: namespace.pool("lumi").get("reason") == "Resources", "it waits in the queue")
    calls = bridge.get_calls
    eventually(lambda: bridge.get_calls >= calls + 3, "it is looked at again")
    assert namespace.pool("lumi")["reason"] == "Resources", "the hour is not over"
    # Its time limit is not near either: no next attempt is queued.
    bridge.move(pb.Pool.RUNNING, queued=0, running=2, reason="", ends_at=bridge._now() + 7200)
    eventually(lambda: namespace.pool("lumi")["queued"] == 0, "it runs")
    calls = bridge.get_calls
    eventually(lambda: bridge.get_calls >= calls + 3, "it is looked at again")
    assert [request.spec.attempt for request in bridge.requests] == [0]
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
