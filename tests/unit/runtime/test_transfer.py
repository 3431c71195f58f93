"""Calls that fail: what is tried again, and what is not. By gRPC's own words, over real connections."""

import datetime as dt
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from isthmus.client.context import Context
from isthmus.client.session import FederationError, Session
from isthmus.client.transfer import FinishedUpdate, push
from isthmus.framing import PUSH, SERVICE
from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pki import Authority
from isthmus_contracts.transport import server_credentials

LIMIT = 4 << 20
DAY = dt.timedelta(days=1)


class Aggregator(grpc.GenericRpcHandler):
    """Takes every update, and welcomes everybody, with a word of ``welcome_bytes``."""

    welcome_bytes = 1

    def service(self, call: Any) -> Any:
        if call.method == PUSH:
            return grpc.stream_unary_rpc_method_handler(self.push)
        assert call.method == f"/{SERVICE}/Control"
        return grpc.stream_stream_rpc_method_handler(self.control)

    def push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        next(messages)
        context.send_initial_metadata(())  # there is room for the others
        for _ in messages:
            pass
        return pb.PushReply(verdict=pb.PushReply.ACCEPTED).SerializeToString()

    def control(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        welcome = pb.Welcome(heartbeat_seconds=3600, instance="x" * self.welcome_bytes)
        yield pb.ServerMessage(welcome=welcome).SerializeToString()
        for _ in messages:
            pass


@pytest.fixture
def aggregator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aggregator]:
    """One with gRPC's usual limit, and the environment of its client."""
    authority = Authority.create("test", DAY)
    handler = Aggregator()
    server = grpc.server(
        futures.ThreadPoolExecutor(4), handlers=[handler], options=[("grpc.max_receive_message_length", LIMIT)]
    )
    port = server.add_secure_port(
        "127.0.0.1:0", server_credentials(authority.issue("aggregator", DAY, hosts=["aggregator"]))
    )
    server.start()
    authority.issue("client", DAY, uris=[identities.client_identity("uid", "pool")]).write(tmp_path)
    for name, value in {
        identities.ENV_ENDPOINT: f"127.0.0.1:{port}",
        identities.ENV_SERVER_NAME: "aggregator",
        identities.ENV_TLS_DIR: str(tmp_path),
        identities.ENV_JOB_UID: "uid",
    }.items():
        monkeypatch.setenv(name, value)
    yield handler
    server.stop(None).wait()


@pytest.mark.parametrize("size", [1, 3 << 20], ids=["one message", "several messages"])
def test_a_header_that_is_too_large_is_not_sent_again(aggregator: Aggregator, size: int) -> None:
    stopping = threading.Event()
    stopping.set()  # else one that is sent again would be for half an hour
    few = {"w": torch.zeros(size, dtype=torch.uint8)}
    many = few | {f"{'block.' * 150}{number}": torch.zeros(1) for number in range(5000)}
    with closing(Session(Context(pool="pool"), evaluates=False, stopping=stopping)) as session:
        assert push(session, FinishedUpdate(1, "digest", 1, {}, few)).verdict == pb.PushReply.ACCEPTED
        with pytest.raises(FederationError, match=r"^push: so many tensors with such long names .* larger than max"):
            push(session, FinishedUpdate(1, "digest", 1, {}, many))


def test_a_word_that_is_too_large_is_not_waited_for(aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus_contracts.transport._CHANNEL_OPTIONS", [("grpc.max_receive_message_length", LIMIT)])
    aggregator.welcome_bytes = LIMIT + 1
    with closing(Session(Context(pool="pool"), evaluates=False, stopping=threading.Event())) as session:
        problem = session.incoming.get(timeout=60)
    assert isinstance(problem, FederationError)
    assert "larger than max" in str(problem)
