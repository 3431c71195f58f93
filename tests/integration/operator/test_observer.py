"""Tests of calls to an aggregator, over real gRPC with mutual TLS."""

import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from isthmus_contracts import identities
from isthmus_contracts.identities import aggregator_server_name
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import ObserverServicer, add_ObserverServicer_to_server
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.transport import server_credentials
from isthmus_operator.effects.aggregators import Aggregators
from isthmus_operator.state.aggregator_status import from_termination, view
from isthmus_operator.state.observed import FederationView
from tests.support.fake_cluster import UID

DAY = dt.timedelta(days=1)
STATUS = pb.FederationStatus(
    phase=pb.FederationStatus.TRAINING,
    completed_rounds=3,
    pools=[
        pb.PoolStatus(
            name="cloud",
            connected=2,
            failures=[pb.ClientFailure(index=1, message="ValueError: x", traceback="a\nValueError: x", time=2.0)],
        )
    ],
    best=pb.MetricValue(name="accuracy", value=0.9, round=2),
)


class FakeAggregator(ObserverServicer):
    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.FederationStatus:
        assert request.job_uid == UID
        return STATUS

    def WatchStatus(self, request: pb.GetStatusRequest, context: Any) -> Iterator[pb.FederationStatus]:
        yield STATUS


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """Start an aggregator on this machine, and yield its CA."""
    ca = Authority.create("job", DAY)
    server = grpc.server(ThreadPoolExecutor(2))
    add_ObserverServicer_to_server(FakeAggregator(), server)
    credentials = ca.issue("aggregator", DAY, hosts=[aggregator_server_name(UID)])
    port = server.add_secure_port("127.0.0.1:0", server_credentials(credentials))
    monkeypatch.setattr(identities, "AGGREGATOR_PORT", port)
    server.start()
    yield ca
    server.stop(0).wait()


async def test_its_status_is_read_at_the_pods_address(authority: Authority) -> None:
    aggregators = Aggregators()
    try:
        said = await aggregators.ask(UID, "127.0.0.1", authority.issue("operator", DAY, uris=["isthmus://x"]))
    finally:
        await aggregators.close()
    assert isinstance(said, FederationView)
    assert (said.phase, said.completed_rounds, said.connected) == ("TRAINING", 3, {"cloud": 2})
    assert said.failures == {"cloud": "a\nValueError: x"}
    assert said.best is not None
    assert said.model is None


async def test_an_aggregator_of_another_authority_is_ignored(authority: Authority) -> None:
    stranger = Authority.create("job", DAY).issue("operator", DAY, uris=["isthmus://x"])
    aggregators = Aggregators()
    try:
        said = await aggregators.ask(UID, "127.0.0.1", stranger)
    finally:
        await aggregators.close()
    assert isinstance(said, str)
    assert said.startswith("no answer from ")


@pytest.mark.parametrize(
    "message", ["", "Traceback (most recent call last)", '{"phase": "NO_SUCH"}', '{"phase": "COMP']
)
def test_other_last_words_are_not_its_status(message: str) -> None:
    assert from_termination(message) is None


def test_what_an_aggregator_says_is_printable_and_bounded() -> None:
    """The image belongs to the user, and all of its report is stored in a FederatedJob."""
    forged = "a\n\x1b[2Jb" + "x" * 5000
    failure = pb.ClientFailure(message=forged, traceback=forged)
    metrics = [pb.MetricValue(name=f"{number}{forged}") for number in range(5000)]
    status = pb.FederationStatus(
        message=forged, metrics=metrics, best=metrics[0], model=pb.ModelStatus(path=forged, sha256=forged),
        pools=[pb.PoolStatus(name="cloud", failures=[failure]), pb.PoolStatus(name="lumi", failures=[failure])],
    )  # fmt: skip
    seen = view(status)
    assert seen.best is not None and seen.model is not None and len(seen.metrics) == 256
    texts = [seen.message, seen.best.name, seen.model.path, seen.model.sha256, *(each.name for each in seen.metrics)]
    assert all(text.isprintable() and len(text) <= 300 for text in texts)
    assert all("\x1b" not in text and len(text) <= 1000 for text in seen.failures.values())
