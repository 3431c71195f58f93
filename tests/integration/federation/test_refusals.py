"""Invalid updates: each is refused with a reason, in the reply and in the metric, and the run continues."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import grpc
import pytest
import torch

from isthmus.aggregator.updates.validation import REASON_METADATA
from isthmus.tensors import State, checksum_of, chunks_of, specs_of
from isthmus_contracts.pb import federation_pb2 as pb

from .conftest import Federation, eventually
from .test_protocol import STATE, HandMadeClient

Make = Callable[..., Federation]
GOOD = {"steps": 3.0}


def counted(job: Federation) -> dict[str, float]:
    """Return the metric by reason."""
    found = re.findall(r'isthmus_updates_refused_total\{.*pool="pool",reason="(\w+)"\} (\S+)', job.metrics())
    return {reason: float(value) for reason, value in found}


def reason_of(client: HandMadeClient, header: pb.UpdateHeader, *stream: object) -> str:
    """Push an update, and return the reason of its refusal."""
    try:
        reply = client.push(header, *stream)  # type: ignore[arg-type]
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DATA_LOSS
        return str(dict(error.trailing_metadata())[REASON_METADATA])
    assert reply.verdict != pb.PushReply.ACCEPTED
    assert reply.message
    return reply.reason


def strange(client: HandMadeClient, header: pb.UpdateHeader) -> bool:
    """Return True if a push is refused because the certificate is another client's, before its body is read."""
    with pytest.raises(grpc.RpcError) as caught:
        client.push(header)
    return caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def finish(job: Federation, *clients: HandMadeClient) -> None:
    """Let training complete; clients without the library must leave explicitly."""
    eventually("training is complete", lambda: job.status().phase == pb.FederationStatus.COMPLETE)
    for client in clients:
        client.close()
    job.wait_for_exit()


@dataclass
class Adversary:
    """Client 0 of a job whose first round is in progress, and the refusals of its updates."""

    job: Federation
    clients: list[HandMadeClient]
    digest: str
    reasons: list[str] = field(default_factory=list)

    def refused(self, state: State = STATE, *stream: object, round_number: int = 1, **changes: object) -> None:
        """Push an update that differs from a valid one, and record the reason of its refusal."""
        header = self.clients[0].header(round_number, self.digest, scalars=GOOD)
        del header.tensors[:]
        header.tensors.extend(specs_of(state))
        for name, value in changes.items():
            if isinstance(value, list):
                getattr(header, name).extend(value)
            elif isinstance(value, dict):
                header.scalars.clear()
                header.scalars.update(value)
            else:
                setattr(header, name, value)
        stream = stream or (list(chunks_of(state)), checksum_of(state))
        self.reasons.append(reason_of(self.clients[0], header, *stream))

    def end_well(self) -> None:
        """Check the count of refusals; then let the clients submit valid updates, and training complete."""
        assert counted(self.job) == Counter(self.reasons)
        assert self.job.status().completed_rounds == 0
        for number in (1, 2):
            for client in self.clients:
                header = client.header(number, self.digest, scalars=GOOD)
                assert client.push(header).verdict == pb.PushReply.ACCEPTED
            if number == 1:
                eventually("the round is committed", lambda: self.job.status().completed_rounds == 1)
                self.digest = self.clients[0].offer(2).base_digest
        # The aggregator exits once completion has been read: no call may follow.
        finish(self.job, *self.clients)


@pytest.fixture
def adversary(federation: Make) -> Iterator[Adversary]:
    """Yield a job with FedNova, which requires a number of steps in every update."""
    job = federation(2, 2, strategy={"algorithm": "FedNova"})
    job.start_aggregator()
    clients = [HandMadeClient(job, index) for index in range(2)]
    clients[0].offer()
    assert clients[0].push(clients[0].header(0)).verdict == pb.PushReply.ACCEPTED
    yield Adversary(job, clients, clients[0].offer().base_digest)
    for client in clients:
        client.close()


def test_unusable_updates(adversary: Adversary) -> None:
    refused, w = adversary.refused, STATE["w"]
    for value in (float("nan"), float("inf"), float("-inf"), 1e30):
        bad = w.clone()
        bad[-1] = value
        refused({"w": bad})
    refused({"v": w})
    refused({"w": w, "v": torch.zeros(3)})
    refused({"w": w[1:].clone()})
    refused({"w": w.reshape(2, -1)})
    refused({"w": w.double()})
    refused(tensors=specs_of(STATE))
    refused(num_examples=0)
    # The encoding of -5 in a signed field: the same ten bytes.
    refused(num_examples=2**64 - 5)
    refused(codecs=["Delta", "Int8"])
    for scalars in ({}, {"steps": 0.0}, {"steps": -1.0}, {"steps": float("nan")}):
        refused(scalars=scalars)
    assert adversary.reasons == [
        *["non_finite"] * 3, "range", "missing_tensor", "unknown_tensor", "shape", "shape", "dtype", "duplicate",
        "examples", "examples", "codec", *["scalars"] * 4,
    ]  # fmt: skip
    adversary.end_well()


def test_what_was_damaged_on_the_way(adversary: Adversary) -> None:
    good, checksum = list(chunks_of(STATE)), checksum_of(STATE)
    flipped = bytearray(good[0])
    flipped[7] ^= 1
    adversary.refused(STATE, [bytes(flipped), *good[1:]], checksum)
    adversary.refused(STATE, good, "0" * 32)
    adversary.refused(STATE, good[:-1], checksum)
    adversary.refused(STATE, good, None)
    adversary.refused(STATE, [*good, b"more"], checksum)
    assert adversary.reasons == ["checksum", "checksum", "truncated", "truncated", "malformed"]
    adversary.end_well()


def test_updates_that_no_round_waits_for(adversary: Adversary) -> None:
    adversary.refused(round_number=2)
    adversary.refused(base_digest="of another model")
    header = adversary.clients[0].header(1, adversary.digest, scalars=GOOD)
    header.index = 7
    assert strange(adversary.clients[0], header)
    old = adversary.clients[1]
    newer = HandMadeClient(adversary.job, 1, attempt=1)
    newer.offer()
    adversary.clients[1] = newer
    adversary.reasons.append(reason_of(old, old.header(1, adversary.digest, scalars=GOOD)))
    old.close()
    assert adversary.reasons == ["stale", "stale", "fenced"]
    adversary.end_well()


def test_initial_weights_are_examined_too(federation: Make) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    with closing(HandMadeClient(job)) as client:
        client.offer()
        header = client.header(0)
        header.index = 1
        assert strange(client, header)
        assert reason_of(client, client.header(0, codecs=["Zstd"])) == "codec"
        header = client.header(0)
        header.tensors[0].size += 4
        assert reason_of(client, header) == "size"
        header.tensors[0].dtype = "F31"
        assert reason_of(client, header) == "dtype"
        assert client.push(client.header(0)).verdict == pb.PushReply.ACCEPTED
        assert client.push(client.header(1, client.offer().base_digest)).verdict == pb.PushReply.ACCEPTED
        finish(job, client)
