"""Clients with valid certificates that hold resources of a real aggregator, which keeps working."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import grpc
import pytest
import torch

from isthmus.aggregator.rpc import service
from isthmus.framing import PUSH
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import FederationStub
from isthmus_contracts.wire.transport import channel

from .conftest import POOL, SERVER_NAME, UID, Federation, eventually
from .test_protocol import HandMadeClient
from .test_strangers import resident_megabytes


class Held:
    """Start a push that sends its first message, and no more until it is released."""

    def __init__(self, client: HandMadeClient, first: bytes) -> None:
        self._go = threading.Event()
        self._first = first
        call: grpc.StreamUnaryMultiCallable[bytes, pb.PushReply] = client.channel.stream_unary(
            PUSH, response_deserializer=pb.PushReply.FromString
        )
        self.call = call.future(self._messages(), timeout=120)

    def _messages(self) -> Iterator[bytes]:
        yield self._first
        self._go.wait(120)

    def close(self) -> None:
        self._go.set()
        self.call.cancel()


def test_one_push_of_a_client_at_a_time(federation: Callable[..., Federation]) -> None:
    """Each of six pushes would keep its large header and its place in the queue. A connection allows eight calls."""
    job = federation(2, 1)
    job.start_aggregator()
    assert job.aggregator is not None
    with ExitStack() as stack:
        state = {"w": torch.zeros(4_000_000)}  # two models of this size are received at a time
        honest, hostile = (stack.enter_context(closing(HandMadeClient(job, index, state=state))) for index in range(2))
        assert honest.offer().kind == pb.Offer.INITIALIZE
        assert honest.push(honest.header(0)).verdict == pb.PushReply.ACCEPTED
        digest = honest.offer(1).base_digest
        first = pb.UpdateChunk(header=hostile.header(1, digest), data=bytes(8 << 20)).SerializeToString()
        before = resident_megabytes(job.aggregator.pid)
        held = [stack.enter_context(closing(Held(hostile, first))) for _ in range(6)]
        for older in held[:-1]:
            assert older.call.code() == grpc.StatusCode.ABORTED
            assert older.call.details() == "a newer call of this client has taken its place"
        assert resident_megabytes(job.aggregator.pid) - before < 100
        assert honest.push(honest.header(1, digest)).verdict == pb.PushReply.ACCEPTED
        assert not held[-1].call.done(), "the newest is received beside it"
        # The same client may still submit an update.
        assert hostile.push(hostile.header(1, digest)).verdict == pb.PushReply.ACCEPTED
        job.wait_for(lambda status: status.phase == pb.FederationStatus.COMPLETE)
    job.wait_for_exit()


@pytest.mark.parametrize("whose", ["its own", "another client's"])
def test_refused_first_messages_are_not_kept(federation: Callable[..., Federation], whose: str) -> None:
    """Regression test: 600 MB were kept until Python's garbage collection."""
    job = federation(2, 1)
    job.start_aggregator()
    assert job.aggregator is not None
    with closing(HandMadeClient(job)) as honest, closing(HandMadeClient(job, 1)) as hostile:
        assert honest.offer().kind == pb.Offer.INITIALIZE
        forged = hostile.header(1, "any")
        forged.instance = "another process"
        forged.index = 1 if whose == "its own" else 0
        message = pb.UpdateChunk(header=forged, data=bytes(24 << 20)).SerializeToString()
        push: grpc.StreamUnaryMultiCallable[bytes, pb.PushReply] = hostile.channel.stream_unary(
            PUSH, response_deserializer=pb.PushReply.FromString
        )
        before = resident_megabytes(job.aggregator.pid)
        for _ in range(25):
            if whose == "its own":
                assert push(iter([message]), timeout=120).verdict == pb.PushReply.FENCED
                continue
            with pytest.raises(grpc.RpcError) as caught:
                push(iter([message]), timeout=120)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert resident_megabytes(job.aggregator.pid) - before < 250


def test_a_control_stream_that_is_not_read_keeps_one_model(federation: Callable[..., Federation]) -> None:
    rounds, judges = 150, 10
    pools = [
        {"name": POOL, "replicas": 1, "cloud": {}},
        {"name": "judge", "replicas": judges, "role": "Evaluate", "cloud": {}},
    ]
    job = federation(1, rounds, pools=pools, selection={"minClients": 1})
    job.start_aggregator()
    assert job.aggregator is not None
    state = {"w": torch.zeros(50_000)}
    silent: queue.Queue[pb.ClientMessage | None] = queue.Queue()
    with ExitStack() as stack:
        for index in range(judges):
            credentials = job.credentials(index, "judge")
            line = stack.enter_context(channel(f"127.0.0.1:{job.port}", credentials, SERVER_NAME))
            hello = pb.Hello(job_uid=UID, pool="judge", index=index, instance=f"j{index}", evaluates=True)
            stack.enter_context(closing(Unread(line, pb.ClientMessage(hello=hello), silent)))
        eventually("the judges are there", lambda: job.status().pools[1].connected == judges)
        client = stack.enter_context(closing(HandMadeClient(job, state=state)))
        assert client.offer().kind == pb.Offer.INITIALIZE
        assert client.push(client.header(0)).verdict == pb.PushReply.ACCEPTED
        before = resident_megabytes(job.aggregator.pid)
        for number in range(1, rounds + 1):
            offer = client.offer(number)
            client.state = {"w": torch.full((50_000,), float(number))}
            assert client.push(client.header(number, offer.base_digest)).verdict == pb.PushReply.ACCEPTED
        job.wait_for(lambda status: status.completed_rounds == rounds)
        # The models of all rounds in all queues would take 300 MB.
        assert resident_megabytes(job.aggregator.pid) - before < 150
        for _ in range(judges):
            silent.put(None)


def test_models_that_are_pulled_and_not_read_do_not_pile_up(federation: Callable[..., Federation]) -> None:
    """Each pull would keep its checkpoint's file on disk, and a part of it in memory."""
    rounds = 8
    pools = [
        {"name": POOL, "replicas": 1, "cloud": {}},
        {"name": "judge", "replicas": 1, "role": "Evaluate", "cloud": {}},
    ]
    job = federation(1, rounds, pools=pools, selection={"minClients": 1})
    job.start_aggregator()
    assert job.aggregator is not None
    with ExitStack() as stack:
        state = {"w": torch.zeros(4_000_000)}
        client = stack.enter_context(closing(HandMadeClient(job, state=state)))
        judge = stack.enter_context(closing(HandMadeClient(job, pool="judge")))
        assert client.offer().kind == pb.Offer.INITIALIZE
        assert client.push(client.header(0)).verdict == pb.PushReply.ACCEPTED
        unread = []
        for number in range(1, rounds):
            offer = client.offer(number)
            unread.append(judge.stub.Pull(pb.PullRequest(digest=offer.base_digest)))
            next(unread[-1])
            assert client.push(client.header(number, offer.base_digest)).verdict == pb.PushReply.ACCEPTED
        pid = job.aggregator.pid
        eventually("their files are gone", lambda: len(kept_checkpoints(pid)) <= service.PULLS + 1)
        assert "Traceback" not in job.log("aggregator")
        for each in unread:
            each.cancel()


def kept_checkpoints(pid: int) -> list[str]:
    """Return the deleted checkpoint files that a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            found.append(str(entry.readlink()))
    return [name for name in found if "/state/checkpoints/" in name and name.endswith(" (deleted)")]


class Unread:
    """Open a control stream without reading its messages."""

    def __init__(
        self, line: grpc.Channel, hello: pb.ClientMessage, silent: "queue.Queue[pb.ClientMessage | None]"
    ) -> None:
        def messages() -> Iterator[pb.ClientMessage]:
            yield hello
            silent.get()

        self._call = FederationStub(line).Control(messages(), timeout=600)

    def close(self) -> None:
        self._call.cancel()


def test_a_control_stream_without_a_hello_is_ended(federation: Callable[..., Federation]) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    with closing(HandMadeClient(job)) as client:
        silent = threading.Event()

        def nothing() -> Iterator[pb.ClientMessage]:
            silent.wait(120)
            yield pb.ClientMessage()

        call = client.stub.Control(nothing(), timeout=120)
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        silent.set()
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.value.details() == f"no hello within {service.HELLO_SECONDS:.0f} s"


def test_a_client_speaks_for_itself_only(federation: Callable[..., Federation]) -> None:
    """Otherwise one client could vote for its whole pool, also in a median."""
    job = federation(2, 1)
    job.start_aggregator()
    with closing(HandMadeClient(job, 0)) as first, closing(HandMadeClient(job, 1)) as second:
        assert first.offer().kind == pb.Offer.INITIALIZE
        assert first.push(first.header(0)).verdict == pb.PushReply.ACCEPTED
        digest = first.offer(1).base_digest
        hello = pb.Hello(job_uid=UID, pool=POOL, index=1, attempt=2**32 - 1, instance="not its own")
        attempts: list[Callable[[], object]] = [
            lambda: first.push(second.header(1, digest)),
            lambda: next(first.stub.Control(iter([pb.ClientMessage(hello=hello)]), timeout=120)),
        ]
        for attempt in attempts:
            with pytest.raises(grpc.RpcError) as error:
                attempt()
            assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert f"not for {POOL}/1" in str(error.value.details())
        # The other client is unaffected, and is counted as itself.
        for client in (second, first):
            assert client.push(client.header(1, digest)).verdict == pb.PushReply.ACCEPTED
        job.wait_for(lambda status: status.phase == pb.FederationStatus.COMPLETE)
    job.wait_for_exit()
