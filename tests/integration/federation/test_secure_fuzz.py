"""Fuzzing of secure aggregation: whatever one client sends in its steps, the others' rounds end."""

import random
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from google.protobuf.message import DecodeError

from isthmus.tensors import State
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from .conftest import Federation
from .protocol_messages import edited
from .secure_by_hand import SecureClient
from .secure_parties import Parties
from .test_faults import records

Make = Callable[..., Federation]
HONEST, ROUNDS = 4, 5
SECURE = {"secureAggregation": {"metrics": {"score": "100"}, "phaseDeadlineSeconds": 5}}
KINDS = ["replace", "insert", "cut", "repeat"]


class Fuzzer:
    """Source of messages that resemble those of all steps, in the place of a client's answers."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._seen: list[bytes] = []
        self._say: Callable[[pb.ClientMessage], None] = lambda message: None
        self.sent = 0

    def attach(self, client: SecureClient) -> None:
        self._say = client.say

    def spoil(self, number: int, answer: sa.SecureClientMessage) -> sa.SecureClientMessage | None:
        """Send some other messages first, and the right answer most of the time."""
        self._seen.append(answer.SerializeToString())
        for _ in range(self._random.choice([0, 0, 1, 2, 3])):
            with suppress(DecodeError):
                message = sa.SecureClientMessage.FromString(self._changed(self._random.choice(self._seen)))
                message.incarnation = self._random.choice([message.incarnation, answer.incarnation])
                self._say(pb.ClientMessage(secure=message))
                self.sent += 1
        return answer if self._random.random() < 0.9 else None

    def _changed(self, raw: bytes) -> bytes:
        places = [self._random.randrange(2**16) for _ in range(self._random.randrange(4))]
        kinds = [(place, self._random.choice(KINDS), self._random.randbytes(3)) for place in places]
        return edited(raw, kinds)


def test_rounds_end_whatever_one_client_sends(federation: Make, script: Path) -> None:
    job = federation(HONEST + 1, ROUNDS, privacy=SECURE, stragglers={"minUpdates": HONEST})
    parties, fuzzer = Parties(), Fuzzer(17)
    job.start_aggregator()
    with closing(SecureClient(job, parties, HONEST, fuzzer.spoil, _unchanged)) as hostile:
        fuzzer.attach(hostile)
        clients = [parties.start_client(job, script, index) for index in range(HONEST)]
        status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * HONEST, job.log("client-0-0")
    assert status.completed_rounds == ROUNDS
    assert all(HONEST <= record["updates"] <= HONEST + 1 for record in records(job))
    assert fuzzer.sent
    assert "Traceback" not in job.log("aggregator")


def _unchanged(_number: int, _header: pb.UpdateHeader, tensors: State) -> State:
    return tensors
