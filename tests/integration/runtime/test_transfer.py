"""Retries of failed calls, over real gRPC connections."""

import datetime as dt
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from isthmus.client.context import Context
from isthmus.client.errors import FederationError
from isthmus.client.session.session import Session
from isthmus.client.session.transfer import FinishedUpdate, push
from isthmus.framing import PUSH, SERVICE
from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.transport import server_credentials

LIMIT = 4 << 20
DAY = dt.timedelta(days=1)
ACCEPTED = pb.PushReply(verdict=pb.PushReply.ACCEPTED)


class Aggregator(grpc.GenericRpcHandler):
    """Aggregator that accepts every update, and welcomes every client with a message of ``welcome_bytes``.

    ``aside``: its replies to updates on the control stream; in place of None the stream ends. The last one is
    repeated. Empty: it does not accept updates on the stream, like older aggregators.
    """

    welcome_bytes = 1

    def __init__(self) -> None:
        self.aside: list[pb.PushReply | None] = []
        self.seen: list[str] = []

    def service(self, call: Any) -> Any:
        if call.method == PUSH:
            return grpc.stream_unary_rpc_method_handler(self.push)
        assert call.method == f"/{SERVICE}/Control"
        return grpc.stream_stream_rpc_method_handler(self.control)

    def push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        self.seen.append("push")
        next(messages)
        context.send_initial_metadata(())  # a buffer is free for the other messages
        for _ in messages:
            pass
        return pb.PushReply(verdict=pb.PushReply.ACCEPTED).SerializeToString()

    def control(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        welcome = pb.Welcome(heartbeat_seconds=3600, instance="x" * self.welcome_bytes, takes_updates=bool(self.aside))
        yield pb.ServerMessage(welcome=welcome).SerializeToString()
        for message in map(pb.ClientMessage.FromString, messages):
            if message.HasField("update"):
                self.seen.append("aside")
                answer = self.aside.pop(0) if len(self.aside) > 1 else self.aside[0]
                if answer is None:
                    return
                yield pb.ServerMessage(reply=answer).SerializeToString()


@pytest.fixture
def aggregator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aggregator]:
    """Start an aggregator with gRPC's default limit; set the environment of its client."""
    authority = Authority.create("test", DAY)
    handler = Aggregator()
    server = grpc.server(
        futures.ThreadPoolExecutor(4), handlers=[handler], options=[("grpc.max_receive_message_length", LIMIT)]
    )
    port = server.add_secure_port(
        "127.0.0.1:0", server_credentials(authority.issue("aggregator", DAY, hosts=["aggregator"]))
    )
    server.start()
    authority.issue("client", DAY, uris=[identities.client_identity("uid", "pool", 0)]).write(tmp_path)
    for name, value in {
        identities.ENV_ENDPOINT: f"127.0.0.1:{port}",
        identities.ENV_SERVER_NAME: "aggregator",
        identities.ENV_TLS_DIR: str(tmp_path),
        identities.ENV_JOB_UID: "uid",
    }.items():
        monkeypatch.setenv(name, value)
    yield handler
    server.stop(None).wait()


def wait_for_welcome(session: Session) -> None:
    until = time.monotonic() + 60
    while not session.aggregator:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("aside", "seen"),
    [
        ([], ["push"]),
        ([ACCEPTED], ["aside"]),
        ([None], ["aside", "push"]),
        ([pb.PushReply(verdict=pb.PushReply.RESEND, message="a damaged one"), ACCEPTED], ["aside", "aside"]),
    ],
    ids=["an older aggregator", "on the control stream", "a stream that breaks", "a damaged one"],
)
def test_an_update_of_one_message(
    aggregator: Aggregator, aside: list[pb.PushReply | None], seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    aggregator.aside = aside
    with closing(Session(Context(pool="pool"), evaluates=False, stopping=threading.Event())) as session:
        wait_for_welcome(session)
        reply = push(session, FinishedUpdate(1, "digest", 1, {}, {"w": torch.zeros(1)}))
    assert reply.verdict == pb.PushReply.ACCEPTED
    assert aggregator.seen == seen
    assert ("push failed (a damaged one); trying again" in caplog.text) == (seen[1:] == ["aside"])


def test_a_large_update_never_goes_on_the_control_stream(aggregator: Aggregator) -> None:
    aggregator.aside = [ACCEPTED]
    large = {"w": torch.zeros(3 << 20, dtype=torch.uint8)}
    many = {f"{'block.' * 15}{number}": torch.zeros(1) for number in range(10_000)}  # a message with a long header
    with closing(Session(Context(pool="pool"), evaluates=False, stopping=threading.Event())) as session:
        wait_for_welcome(session)
        for state in (large, many):
            assert push(session, FinishedUpdate(1, "digest", 1, {}, state)).verdict == pb.PushReply.ACCEPTED
    assert aggregator.seen == ["push", "push"]


@pytest.mark.parametrize("size", [1, 3 << 20], ids=["one message", "several messages"])
def test_a_header_that_is_too_large_is_not_sent_again(aggregator: Aggregator, size: int) -> None:
    stopping = threading.Event()
    stopping.set()  # otherwise it would be retried for half an hour
    few = {"w": torch.zeros(size, dtype=torch.uint8)}
    many = few | {f"{'block.' * 150}{number}": torch.zeros(1) for number in range(5000)}
    with closing(Session(Context(pool="pool"), evaluates=False, stopping=stopping)) as session:
        assert push(session, FinishedUpdate(1, "digest", 1, {}, few)).verdict == pb.PushReply.ACCEPTED
        with pytest.raises(FederationError, match=r"^push: the names of all tensors do not fit .* larger than max"):
            push(session, FinishedUpdate(1, "digest", 1, {}, many))


def test_a_word_that_is_too_large_is_not_waited_for(aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [("grpc.max_receive_message_length", LIMIT)]
    monkeypatch.setattr("isthmus_contracts.wire.transport._CHANNEL_OPTIONS", options)
    aggregator.welcome_bytes = LIMIT + 1
    with closing(Session(Context(pool="pool"), evaluates=False, stopping=threading.Event())) as session:
        problem = session.incoming.get(timeout=60)
    assert isinstance(problem, FederationError)
    assert "larger than max" in str(problem)
