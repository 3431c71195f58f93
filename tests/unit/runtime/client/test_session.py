"""Messages that a client accepts from its aggregator."""

import pytest

from isthmus.client.context import Context
from isthmus.client.session.session import Session
from isthmus_contracts.pb import federation_pb2 as pb


@pytest.mark.parametrize(
    ("asked", "taken"),
    [(0, 10), (5, 5), (1e-9, 1), (-5, 10), (1e300, 300), (float("inf"), 300), (float("nan"), 10)],
)
def test_heartbeats_are_neither_a_flood_nor_absent(asked: float, taken: float) -> None:
    session = object.__new__(Session)
    session.endpoint, session.context, session._heartbeat_seconds = "localhost:1", Context(pool="pool"), 10.0
    assert not session._handle(pb.ServerMessage(welcome=pb.Welcome(heartbeat_seconds=asked, instance="x")))
    assert session._heartbeat_seconds == taken
