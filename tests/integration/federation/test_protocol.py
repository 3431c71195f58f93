"""The protocol without the library: replies to damaged, stale and repeated updates."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import grpc
import pytest
import torch

from isthmus.aggregator.updates.receive_slots import RECEPTION_BYTES
from isthmus.tensors import Data, State, checksum_of, chunks_of, specs_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import FederationStub
from isthmus_contracts.wire.transport import channel

from .conftest import POOL, SERVER_NAME, UID, Federation, eventually

STATE = {"w": torch.arange(300_000, dtype=torch.float32)}


class HandMadeClient:
    """Client that does not use the library."""

    def __init__(
        self, job: Federation, index: int = 0, attempt: int = 0, state: State = STATE, pool: str = POOL,
        **hello_fields: Any,
    ) -> None:  # fmt: skip
        self.job, self.pool, self.index, self.attempt, self.state = job, pool, index, attempt, state
        self.instance = f"i{index}-{attempt}"
        self.channel = channel(f"127.0.0.1:{job.port}", job.credentials(index, pool), SERVER_NAME)
        self.stub = FederationStub(self.channel)
        hello = pb.Hello(
            job_uid=UID, pool=pool, index=index, attempt=attempt, instance=self.instance, **hello_fields
        )  # fmt: skip
        self._to_say: queue.Queue[pb.ClientMessage | None] = queue.Queue()
        self.say(pb.ClientMessage(hello=hello))
        self.messages = self.stub.Control(iter(self._to_say.get, None))

    def close(self) -> None:
        open_channel, self.channel = self.channel, None  # type: ignore[assignment]
        if open_channel is not None:
            open_channel.close()
            self._to_say.put(None)

    def say(self, message: pb.ClientMessage) -> None:
        self._to_say.put(message)

    def offer(self, round_number: int = 0) -> pb.Offer:
        """Return the next offer, or the next for a round."""
        offers = (message.offer for message in self.messages if message.HasField("offer"))
        return next(offer for offer in offers if offer.round == round_number or not round_number)

    def header(self, round_number: int, digest: str = "", **changes: object) -> pb.UpdateHeader:
        header = pb.UpdateHeader(
            job_uid=UID, pool=self.pool, index=self.index, round=round_number, base_digest=digest, num_examples=5,
            tensors=specs_of(self.state), attempt=self.attempt, instance=self.instance,
        )  # fmt: skip
        header.MergeFrom(pb.UpdateHeader(**changes))  # type: ignore[arg-type]
        return header

    def push(
        self, header: pb.UpdateHeader, data: Iterable[Data] | None = None, checksum: str | None = ""
    ) -> pb.PushReply:
        def parts() -> Iterator[pb.UpdateChunk]:
            """A header, data and a trailer in separate messages, unlike the library's framing, are accepted."""
            yield pb.UpdateChunk(header=header)
            for chunk in chunks_of(self.state) if data is None else data:
                yield pb.UpdateChunk(data=bytes(chunk))
            if checksum is not None:
                yield pb.UpdateChunk(trailer=pb.Trailer(checksum=checksum or checksum_of(self.state)))

        return self.stub.Push(parts(), timeout=120)


@pytest.fixture
def clients(federation: Callable[..., Federation]) -> Iterator[list[HandMadeClient]]:
    job = federation(2, 2)
    job.start_aggregator()
    made = [HandMadeClient(job, index) for index in range(2)]
    yield made
    for client in made:
        client.close()


def test_a_round_by_hand(clients: list[HandMadeClient]) -> None:
    first, second = clients
    assert first.offer().kind == pb.Offer.INITIALIZE
    assert first.push(first.header(0)).verdict == pb.PushReply.ACCEPTED
    offer = first.offer()
    assert (offer.kind, offer.round, offer.base_round) == (pb.Offer.TRAIN, 1, 0)
    digest = offer.base_digest

    def status() -> tuple[int, int]:
        seen = first.job.status()
        return seen.completed_rounds, seen.submitted

    # A truncated stream and a damaged one are refused, and the round still waits for this client.
    for data, checksum in (([b"\0" * 1000], None), ([b"\0" * STATE["w"].nbytes], "")):
        with pytest.raises(grpc.RpcError) as error:
            first.push(first.header(1, digest), data, checksum)
        assert error.value.code() == grpc.StatusCode.DATA_LOSS
    assert status() == (0, 0)
    # Stale ones.
    assert first.push(first.header(2, digest)).verdict == pb.PushReply.STALE
    assert first.push(first.header(1, "another model")).verdict == pb.PushReply.STALE
    # A valid update, and its repetition: accepted, and counted once.
    assert first.push(first.header(1, digest)).verdict == pb.PushReply.ACCEPTED
    assert first.push(first.header(1, digest)).verdict == pb.PushReply.ACCEPTED
    assert status() == (0, 1)
    # An update that does not fit the model is refused with the tensor's name.
    strange = second.header(1, digest)
    strange.tensors[0].name = "v"
    reply = second.push(strange)
    assert (reply.verdict, reply.message) == (pb.PushReply.INVALID, "tensors are missing: w")
    assert second.push(second.header(1, digest, codecs=["Zip"])).message == "unknown codecs: Zip"
    unasked = second.push(second.header(1, digest, codecs=["Delta", "Int8"]))
    assert (unasked.verdict, unasked.message) == (pb.PushReply.INVALID, "the job's uploads are None, not Delta+Int8")
    empty = second.header(1, digest)
    empty.num_examples = 0
    assert second.push(empty).message == "num_examples must be at least 1"
    # The round does not wait for a client whose update was refused for good, but two updates are needed.
    assert second.push(second.header(1, digest)).verdict == pb.PushReply.ACCEPTED
    eventually("the round is committed", lambda: status()[0] == 1)
    metrics = first.job.metrics()
    for result, count in (("accepted", 3), ("repeated", 1), ("stale", 2), ("corrupt", 2), ("invalid", 4)):
        assert f'pool="{POOL}",result="{result}"}} {count}.0' in metrics


def test_updates_on_the_control_stream(clients: list[HandMadeClient]) -> None:
    first, second = clients
    assert next(first.messages).welcome.takes_updates

    def answer(client: HandMadeClient, header: pb.UpdateHeader, checksum: str = "") -> pb.PushReply:
        data, trailer = b"".join(chunks_of(client.state)), pb.Trailer(checksum=checksum or checksum_of(client.state))
        return answer_to(client, pb.UpdateChunk(header=header, data=data, trailer=trailer).SerializeToString())

    def answer_to(client: HandMadeClient, update: bytes) -> pb.PushReply:
        client.say(pb.ClientMessage(update=update))
        return next(message.reply for message in client.messages if message.HasField("reply"))

    first.offer()
    assert answer(first, first.header(0)).verdict == pb.PushReply.ACCEPTED
    digest = first.offer(1).base_digest
    # The reply is RESEND where Push would return an error status, and for messages that are not valid updates.
    damaged = answer(first, first.header(1, digest), "0" * 32)
    assert (damaged.verdict, damaged.reason) == (pb.PushReply.RESEND, "checksum")
    others = answer(first, second.header(1, digest))
    assert (others.verdict, others.message) == (pb.PushReply.RESEND, f"this is the control stream of {POOL}/0")
    for update in (b"\xff", pb.UpdateChunk(header=first.header(1, digest)).SerializeToString()):
        reply = answer_to(first, update)
        assert (reply.verdict, reply.reason) == (pb.PushReply.RESEND, "malformed")
    assert first.job.status().submitted == 0
    # An update is counted once, however it is sent again.
    good = answer(first, first.header(1, digest))
    assert (good.verdict, good.round, bool(good.instance)) == (pb.PushReply.ACCEPTED, 1, True)
    assert answer(first, first.header(1, digest)).message == "counted before"
    assert first.push(first.header(1, digest)).message == "counted before"
    assert first.job.status().submitted == 1
    # An unusable update, and one that ends the round.
    stale = answer(second, second.header(1, "another model"))
    assert (stale.verdict, stale.reason) == (pb.PushReply.STALE, "stale")
    assert answer(second, second.header(1, digest)).verdict == pb.PushReply.ACCEPTED
    eventually("the round is committed", lambda: first.job.status().completed_rounds == 1)
    metrics = first.job.metrics()
    for result, count in (("accepted", 3), ("repeated", 2), ("stale", 1), ("corrupt", 1)):
        assert f'pool="{POOL}",result="{result}"}} {count}.0' in metrics


def test_other_callers_may_not_observe(clients: list[HandMadeClient]) -> None:
    from isthmus_contracts.pb.federation_pb2_grpc import ObserverStub

    with pytest.raises(grpc.RpcError) as error:
        ObserverStub(clients[0].channel).GetStatus(pb.GetStatusRequest(job_uid=UID), timeout=60)
    assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_only_the_current_model_is_served(clients: list[HandMadeClient]) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(clients[0].stub.Pull(pb.PullRequest(job_uid=UID, digest="other"), timeout=60))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_clients_on_slow_links_need_not_wait_for_each_other(federation: Callable[..., Federation]) -> None:
    """Only few updates of large models are received at a time, and here none is complete before all are half-way."""
    count, size = 6, 4_000_000
    assert 4 * size > RECEPTION_BYTES // 2
    job = federation(count, 1)
    job.start_aggregator()
    half_way = threading.Barrier(count, timeout=120)

    def slowly(state: State) -> Iterator[Data]:
        for number, chunk in enumerate(chunks_of(state)):
            if number == 8:
                half_way.wait()
            yield chunk

    def train(client: HandMadeClient) -> "pb.PushReply.Verdict.ValueType":
        offer = client.offer(1)
        return client.push(client.header(1, offer.base_digest), slowly(client.state)).verdict

    with ExitStack() as stack:
        states = [{"w": torch.full((size,), float(index))} for index in range(count)]
        clients = [
            stack.enter_context(closing(HandMadeClient(job, index, state=states[index]))) for index in range(count)
        ]
        assert clients[0].offer().kind == pb.Offer.INITIALIZE
        assert clients[0].push(clients[0].header(0)).verdict == pb.PushReply.ACCEPTED
        with ThreadPoolExecutor(count) as pool:
            assert list(pool.map(train, clients)) == [pb.PushReply.ACCEPTED] * count
        job.wait_for(lambda status: status.phase == pb.FederationStatus.COMPLETE)
    job.wait_for_exit()
    model = torch.load(job.state / "model.pt", weights_only=True)
    assert torch.equal(model["w"], torch.full((size,), 2.5))


def test_a_model_of_very_many_tensors(federation: Callable[..., Federation]) -> None:
    """The header is larger than gRPC's default limit."""
    state = {f"{'layer.' * 15}{number}": torch.zeros(1) for number in range(50_000)}
    job = federation(1, 1)
    job.start_aggregator()
    with closing(HandMadeClient(job, state=state)) as client:
        client.offer()
        header = client.header(0)
        assert header.ByteSize() > 4 << 20
        assert client.push(header).verdict == pb.PushReply.ACCEPTED
        digest = client.offer(1).base_digest
        answer = client.stub.Pull(pb.PullRequest(job_uid=UID, round=0, digest=digest))
        assert sum(len(chunk.header.tensors) for chunk in answer) == len(state)


def test_initial_weights_that_could_not_be_stored(clients: list[HandMadeClient]) -> None:
    first = clients[0]
    first.offer()
    header = first.header(0)
    header.tensors[0].name = "__metadata__"
    reply = first.push(header)
    assert (reply.verdict, reply.reason) == (pb.PushReply.INVALID, "unknown_tensor")
    assert "safetensors keeps that name" in reply.message
    header.tensors[0].MergeFrom(pb.TensorSpec(name="w", size=4 << 50))
    header.tensors[0].shape[:] = [1 << 50]
    reply = first.push(header, [])
    assert (reply.verdict, reply.reason) == (pb.PushReply.INVALID, "size")
    assert reply.message.startswith("the model takes 4503599627370496 bytes, and the aggregator's memory has room for ")
