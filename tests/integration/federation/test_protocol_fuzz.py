"""Fuzzing: the aggregator survives arbitrary messages, follows the protocol, and serves an honest client.

By default some seconds of the same inputs each time. ``ISTHMUS_FUZZ_SECONDS=600`` goes on with new ones for so long, as
``make fuzz`` does.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import torch
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isthmus.aggregator.storage.checkpoints import CheckpointStore
from isthmus.metric_names import MAX_METRICS, MAX_NAME_LENGTH
from isthmus.tensors import checksum_of, chunks_of, specs_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.transport import channel

from .conftest import POOL, SERVER_NAME, UID, Federation, eventually
from .protocol_messages import EDITS, Edit, arbitrary, edited, mostly, nearly, resolved
from .test_protocol import HandMadeClient

SECONDS = float(os.environ.get("ISTHMUS_FUZZ_SECONDS", "0"))
HONEST, JUDGE, SIZE = "honest", "judge", 3
STATE = {"w": torch.ones(50), "n": torch.zeros(1)}
# Placeholders in messages for values that are known only when they are sent.
DIGEST, INSTANCE = "{digest}", "{instance}"
KNOWN = [UID, POOL, JUDGE, HONEST, DIGEST, INSTANCE]
ROUND = 2**31 - 7
"""Placeholder for the round in progress."""
# Timeouts of calls that wait. Seconds.
PATIENCE = 1.0
GROWTH_BYTES = 250 << 20
FEDERATION, OBSERVER = "/isthmus.federation.v1alpha1.Federation", "/isthmus.federation.v1alpha1.Observer"

GOOD_HELLO = pb.Hello(job_uid=UID, pool=POOL, index=2, instance=INSTANCE, version="1")
GOOD_HEADER = pb.UpdateHeader(
    job_uid=UID, pool=POOL, index=2, instance=INSTANCE, round=ROUND, base_digest=DIGEST, num_examples=5,
    tensors=specs_of(STATE), buffers=["n"], metrics={"loss": 0.5}, seconds={"train": 1.0},
)  # fmt: skip
GOOD_UPDATE = pb.UpdateChunk(
    header=GOOD_HEADER, data=b"".join(bytes(chunk) for chunk in chunks_of(STATE)),
    trailer=pb.Trailer(checksum=checksum_of(STATE)),
)  # fmt: skip

CONTROL, PUSH = f"{FEDERATION}/Control", f"{FEDERATION}/Push"
HELLO = pb.ClientMessage(hello=GOOD_HELLO)
UPDATE = pb.ClientMessage(update=GOOD_UPDATE.SerializeToString())


class Call(NamedTuple):
    """A client's call: its messages, and the changes of their bytes."""

    method: str
    pool: str
    messages: list[tuple[Message, list[Edit]]]


def _control() -> st.SearchStrategy[list[tuple[Message, list[Edit]]]]:
    hello = nearly(GOOD_HELLO, KNOWN).map(lambda hello: pb.ClientMessage(hello=hello))
    later = [nearly(pb.ClientMessage(**{name: message}), KNOWN) for name, message in LATER.items()]
    update = nearly(GOOD_UPDATE, KNOWN).map(lambda update: pb.ClientMessage(update=update.SerializeToString()))
    anything = st.one_of(update, *later, arbitrary(pb.ClientMessage.DESCRIPTOR, KNOWN))
    first = st.tuples(mostly(hello, anything), EDITS)
    return st.tuples(first, st.lists(st.tuples(anything, EDITS), max_size=4)).map(lambda parts: [parts[0], *parts[1]])


LATER: dict[str, Message] = {
    "heartbeat": pb.Heartbeat(stage="training"),
    "evaluation": pb.Evaluation(model_digest=DIGEST, num_examples=5, metrics={"accuracy": 0.5}),
    "failure": pb.Failure(message="ValueError: no", traceback="Traceback"),
    "leaving": pb.Leaving(reason="SIGTERM"),
}
GOOD_PULL = pb.PullRequest(job_uid=UID, digest=DIGEST)


def _update_in(message: bytes) -> bytes | None:
    """Return the update in a message of a control stream, if it can be parsed."""
    with suppress(DecodeError):
        parsed = pb.ClientMessage.FromString(message)
        return parsed.update if parsed.HasField("update") else None
    return None


def _one(message: st.SearchStrategy[Message]) -> st.SearchStrategy[list[tuple[Message, list[Edit]]]]:
    return st.tuples(message, EDITS).map(lambda pair: [pair])


_PUSH = st.lists(st.tuples(nearly(GOOD_UPDATE, KNOWN), EDITS), min_size=1, max_size=3)
CALLS = st.lists(
    st.one_of(
        st.builds(Call, st.just(CONTROL), st.sampled_from([POOL, JUDGE]), _control()),
        st.builds(Call, st.just(PUSH), st.sampled_from([POOL, JUDGE]), _PUSH),
        st.builds(Call, st.just(f"{FEDERATION}/Pull"), st.just(POOL), _one(nearly(GOOD_PULL, KNOWN))),
        st.builds(
            Call, st.sampled_from([f"{OBSERVER}/GetStatus", f"{OBSERVER}/WatchStatus"]), st.just(POOL),
            _one(arbitrary(pb.GetStatusRequest.DESCRIPTOR, KNOWN)),
        ),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


class Hostile:
    """Client that makes calls with raw bytes, and checks the replies."""

    def __init__(self, job: Federation, meanings: "Honest") -> None:
        self._channels = {pool: channel(f"127.0.0.1:{job.port}", job.credentials(index, pool), SERVER_NAME)
                          for pool, index in ((POOL, 2), (JUDGE, 0))}  # fmt: skip
        self._job, self._honest = job, meanings
        self._standing = HandMadeClient(job, 2)
        self.accepted = 0

    def join(self) -> None:
        """Send a valid hello, so that the client is selected in the next round."""
        self._standing.close()
        self._standing = HandMadeClient(self._job, 2)
        next(message for message in self._standing.messages if message.HasField("welcome"))

    def close(self) -> None:
        self._standing.close()
        for each in self._channels.values():
            each.close()

    def make(self, call: Call) -> None:
        words = {DIGEST: self._honest.digest, INSTANCE: self._standing.instance}
        raw = []
        for message, edits in call.messages:
            real = type(message)()
            real.CopyFrom(message)
            raw.append(edited(self._resolved(real, words).SerializeToString(), edits))
        method = self._channels[call.pool].stream_stream(call.method)
        if call.method.endswith("Control"):
            self._talk(method, raw)
        else:
            with suppress(grpc.RpcError):
                answers = list(method(iter(raw), timeout=PATIENCE))
                if call.method.endswith("Push"):
                    self._check(pb.PushReply.FromString(answers[0]), raw[0])

    def _talk(self, method: Any, raw: list[bytes]) -> None:
        """Send the messages one by one; disconnect after at most a second."""
        sent: queue.Queue[bytes | None] = queue.Queue()
        for message in raw:
            sent.put(message)
        answered = method(iter(sent.get, None), timeout=PATIENCE)
        asked = [message for message in raw[1:] if _update_in(message) is not None]
        with suppress(grpc.RpcError):
            for answer in answered:
                message = pb.ServerMessage.FromString(answer)
                if message.HasField("reply") and asked:
                    self._check(message.reply, _update_in(asked.pop(0)) or b"")
                if message.HasField("stop") or not asked:
                    break
        sent.put(None)
        answered.cancel()

    def _resolved(self, message: Message, words: dict[str, str]) -> Message:
        for header in (message, getattr(message, "header", None), getattr(message, "hello", None)):
            if getattr(header, "round", 0) == ROUND:
                header.round = self._honest.round
        if isinstance(message, pb.ClientMessage) and message.update:
            with suppress(DecodeError):
                inner = self._resolved(pb.UpdateChunk.FromString(message.update), words)
                message.update = inner.SerializeToString()
        return resolved(message, words)

    def _check(self, reply: pb.PushReply, update: bytes) -> None:
        """Check that accepted messages are valid, and that every reply is short and printable."""
        assert len(reply.message) <= 300 and reply.message.isprintable()
        if reply.verdict != pb.PushReply.ACCEPTED or reply.message:
            return
        self.accepted += 1
        header = pb.UpdateChunk.FromString(update).header
        assert (header.job_uid, header.pool) == (UID, POOL) and header.index < SIZE
        assert 1 <= header.num_examples <= 2**53
        assert 1 <= header.round <= self._honest.round
        assert [(spec.name, list(spec.shape)) for spec in header.tensors] == [("w", [50]), ("n", [1])]
        assert set(header.buffers) <= {"w", "n"} and len(header.metrics) <= MAX_METRICS
        assert all(name.isprintable() and len(name) <= MAX_NAME_LENGTH for name in header.metrics)


class Honest:
    """Client that follows the protocol, and knows the current round."""

    def __init__(self, job: Federation) -> None:
        self.client = HandMadeClient(job, state=STATE, pool=HONEST)
        self.digest, self.round, self.committed = "", 0, 0
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()
        eventually("it is asked", lambda: self._asked)

    def begin(self) -> None:
        """Submit the initial weights."""
        assert self.client.push(self.client.header(0)).verdict == pb.PushReply.ACCEPTED
        eventually("it is offered work", lambda: self.round)

    _asked = False

    def _listen(self) -> None:
        with suppress(grpc.RpcError):
            for message in self.client.messages:
                if message.offer.kind == pb.Offer.INITIALIZE:
                    self._asked = True
                elif message.offer.kind == pb.Offer.TRAIN:
                    self.digest, self.committed = message.offer.base_digest, message.offer.base_round
                    self.round = message.offer.round
                elif message.HasField("committed"):
                    self.committed = message.committed.round

    def train(self) -> None:
        """Submit an update for a round, and wait for its commit; other clients may end the round earlier."""

        def accepted() -> int:
            number = self.round
            reply = self.client.push(self.client.header(number, self.digest))
            return number if reply.verdict == pb.PushReply.ACCEPTED else 0

        number = eventually("an honest update is accepted", accepted)
        eventually("its round is committed", lambda: self.committed >= number)


def resident(job: Federation) -> int:
    assert job.aggregator is not None
    pages = int(Path(f"/proc/{job.aggregator.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_arbitrary_messages_of_clients(federation: Callable[..., Federation]) -> None:
    pools = [
        {"name": HONEST, "replicas": 1, "cloud": {}},
        {"name": POOL, "replicas": SIZE, "cloud": {}},
        {"name": JUDGE, "replicas": 1, "role": "Evaluate", "cloud": {}},
    ]
    late = {"late": "Fold", "roundDeadlineSeconds": 1, "minUpdates": 1}
    job = federation(1, 1_000_000, pools=pools, stragglers=late)
    job.start_aggregator()
    honest = Honest(job)
    with closing(honest.client), closing(Hostile(job, honest)) as hostile:
        hostile.join()
        honest.begin()
        until = time.monotonic() + SECONDS
        batch = settings(
            max_examples=40, deadline=None, database=None, derandomize=not SECONDS,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip

        @batch
        @example([Call(CONTROL, POOL, [(HELLO, []), (UPDATE, [])])])
        @example([Call(CONTROL, POOL, [(HELLO, [])]), Call(PUSH, POOL, [(GOOD_UPDATE, [])])])
        @given(CALLS)
        def exchange(calls: list[Call]) -> None:
            for call in calls:
                hostile.make(call)

        exchange()
        assert hostile.accepted  # valid messages are accepted, so refusals are due to the others' content
        before = resident(job)
        while True:
            hostile.join()
            honest.train()
            assert job.aggregator is not None and job.aggregator.poll() is None
            log = job.log("aggregator")
            assert "Traceback" not in log and "exception" not in log.lower(), log[-5000:]
            assert all(line.isprintable() for line in log.splitlines())
            status = job.status()
            assert status.ByteSize() < 500_000 and status.phase == pb.FederationStatus.TRAINING
            assert resident(job) < before + GROWTH_BYTES
            if time.monotonic() >= until:
                break
            exchange()
    job.kill_aggregator()
    newest = CheckpointStore(job.state, UID, keep=3).latest()
    assert newest is not None and newest.round >= honest.committed
    assert torch.isfinite(newest.state["w"]).all()
