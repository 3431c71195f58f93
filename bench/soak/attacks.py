"""Attacks by a client with a valid certificate.

Each is a function of a connected peer and returns how many of its updates were accepted.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import torch

from isthmus.tensors import State
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import ObserverStub

from ..harness.aggregator_process import POOL, UID
from .peer import CALL_SECONDS, Peer, model

Attack = Callable[[Peer], int]
ESCAPES = "acc\n2026-01-01 00:00:00,000 INFO round 9 committed: forged\x1b[2J\x1b]0;owned\x07[/bold]\u202e"
HELD_SECONDS = 0.5
_REFUSED_CALLS = (grpc.RpcError, OSError, ValueError)


def _taken(*replies: pb.PushReply | None) -> int:
    return sum(reply is not None and reply.verdict == pb.PushReply.ACCEPTED for reply in replies)


def bad_values(peer: Peer) -> int:
    """Push NaN, infinity, huge numbers and invalid numbers of examples."""
    nan, huge = model(float("nan")), model(2.0**61)
    good = model(1.0)
    counts = (0, 2**53 + 1, 2**63, 2**64 - 1)
    return _taken(
        *(peer.push(peer.header(bad), bad) for bad in (nan, model(float("inf")), huge)),
        *(peer.push(peer.header(good, num_examples=count), good) for count in counts),
    )


def bad_tensors(peer: Peer) -> int:
    """Push tensors with wrong shapes, types and names."""
    good = model(1.0)
    half = {name: value.half() for name, value in good.items()}
    more: State = {**good, "x" * 600: torch.ones(1)}
    less = {name: value for name, value in good.items() if name != "2.bias"}
    wide: State = {**good, "2.bias": torch.ones(2**16)}
    twice = peer.header(good)
    twice.tensors.append(twice.tensors[0])
    endless = peer.header(good)
    endless.tensors[0].shape[:] = [2**64 - 1, 0]
    deep = peer.header(good)
    deep.tensors[0].shape[:] = [1] * 5000
    states = (half, more, less, wide)
    headers = (twice, endless, deep)
    return _taken(
        *(peer.push(peer.header(state), state) for state in states), *(peer.push(header, good) for header in headers)
    )


def bad_words(peer: Peer) -> int:
    """Send names of megabytes, with line ends and terminal escapes, in every field with a name."""
    good = model(1.0)
    changes: tuple[dict[str, object], ...] = (
        {"metrics": {"\x01" * (4 << 20): 1.0}},
        {"metrics": {str(number): 1.0 for number in range(50_000)}},
        {"metrics": {ESCAPES: 1.0}},
        {"buffers": ["x" * (4 << 20)]},
        {"buffers": [str(number) for number in range(50_000)]},
        {"scalars": {str(number): 1.0 for number in range(10_000)}},
        {"seconds": {ESCAPES: float("nan")}},
        {"codecs": [ESCAPES]},
        {"codecs": ["Zstd"] * 1000},
        {"codecs": ["TopK=nan"]},
        {"instance": "i" * (1 << 20)},
        {"base_digest": ESCAPES},
    )
    return _taken(*(peer.push(peer.header(good, **each), good) for each in changes))


def bad_streams(peer: Peer) -> int:
    """Push streams that are truncated, damaged, too long, out of order, or compressed junk."""
    good = model(1.0)
    header = peer.header(good)
    junk = secrets.token_bytes(10_000)
    packed = [
        peer.push(peer.header(good, codecs=[codec]), good, data=junk, checksum="0" * 16)
        for codec in ("Zstd", "Int8", "TopK", "Float16")
    ]
    return _taken(
        *packed,
        peer.push(header, good, data=b""),
        peer.push(header, good, data=junk),
        peer.push(header, good, data=bytes(8 << 20)),
        peer.push(header, good, checksum="wrong"),
        peer.push_messages([pb.UpdateChunk(data=junk)]),
        peer.push_messages([pb.UpdateChunk(header=header), pb.UpdateChunk(header=header)]),
        peer.push_messages([pb.UpdateChunk(trailer=pb.Trailer(checksum="x"))]),
        peer.push_messages([]),
    )


def another_client(peer: Peer) -> int:
    """Send updates and hellos in the name of another client, another pool or an unknown client."""
    good, taken = model(1.0), 0
    for pool, index in ((POOL, 0), (POOL, 7), (peer.pool, peer.index + 1), (peer.pool, 2**31), ("nobody", 0)):
        taken += _taken(peer.push(peer.header(good, pool=pool, index=index, instance="forged"), good))
        hello = pb.Hello(job_uid=UID, pool=pool, index=index, instance="forged", attempt=2**32 - 1)
        with suppress(*_REFUSED_CALLS):
            list(peer.stub.Control(iter([pb.ClientMessage(hello=hello)]), timeout=CALL_SECONDS))
    return taken


def another_round(peer: Peer) -> int:
    """Push to past and future rounds, to rounds without an offer, and for attempts that do not exist."""
    good = model(1e6)
    peer.push(peer.header(good, round=0), good)  # the reply is that initial weights exist; nothing is kept
    rounds = (max(peer.round - 1, 1), peer.round + 1, 2**32 - 1)
    return _taken(
        *(peer.push(peer.header(good, round=number, base_digest="old"), good) for number in rounds),
        peer.push(peer.header(good, base_digest="another"), good),
        *(peer.push(peer.header(good, attempt=attempt), good) for attempt in (1, 2**32 - 1)),
    )


def huge_evaluations(peer: Peer) -> int:
    """Report measurements so good that they would meet the job's target."""
    for examples in (0, 1, 2**53, 2**64 - 1):
        for value in (1.0, 1e308, float("inf"), float("nan")):
            metrics = {"accuracy": value, "loss": -value}
            peer.say(
                pb.ClientMessage(
                    evaluation=pb.Evaluation(model_digest=peer.digest, num_examples=examples, metrics=metrics)
                )
            )
    names = {str(number): 1.0 for number in range(20_000)} | {ESCAPES: 1.0}
    peer.say(pb.ClientMessage(evaluation=pb.Evaluation(model_digest=peer.digest, num_examples=1, metrics=names)))
    return 0


def junk_text(peer: Peer) -> int:
    """Send megabytes of escapes in every message with a text."""
    long = ESCAPES + "L" * (4 << 20)
    for _ in range(20):
        peer.say(pb.ClientMessage(leaving=pb.Leaving(reason=long[: 1 << 16])))
        peer.say(pb.ClientMessage(heartbeat=pb.Heartbeat(stage=long[: 1 << 16])))
    peer.say(pb.ClientMessage(leaving=pb.Leaving(reason=long)))
    peer.say(pb.ClientMessage(failure=pb.Failure(message=long, traceback=long)))
    return 0


def message_flood(peer: Peer) -> int:
    """Send thousands of messages and unreadable updates on the control stream."""
    for number in range(2000):
        peer.say(pb.ClientMessage(heartbeat=pb.Heartbeat(stage=str(number))))
        peer.say(pb.ClientMessage(update=b"\xff" * 100))
    return 0


def push_flood(peer: Peer) -> int:
    """Open two dozen pushes at a time, each with a megabyte in its first message, and leave them open."""
    good = model(1.0)
    first = pb.UpdateChunk(header=peer.header(good), data=bytes(1 << 20))

    def held() -> Iterator[pb.UpdateChunk]:
        yield first
        time.sleep(HELD_SECONDS)

    calls = [peer.begin_push(held()) for _ in range(24)]
    time.sleep(HELD_SECONDS)
    for call in calls:
        call.cancel()
    return 0


def slow_push(peer: Peer) -> int:
    """Push one byte at a time."""
    good = model(1.0)

    def dribble() -> Iterator[pb.UpdateChunk]:
        yield pb.UpdateChunk(header=peer.header(good))
        for _ in range(5):
            time.sleep(HELD_SECONDS / 5)
            yield pb.UpdateChunk(data=b"\0")

    return _taken(peer.push_messages(dribble()))


def come_and_go(peer: Peer) -> int:
    """Join and leave repeatedly, each time as a newer process."""
    for number in range(20):
        with Peer(peer.port, peer.tls, peer.pool, peer.index, attempt=number):
            pass
    return 0


def many_connections(peer: Peer) -> int:
    """Open the maximum number of connections, with a control stream on each."""
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(Peer(peer.port, peer.tls, peer.pool, peer.index))
        time.sleep(HELD_SECONDS)
    return 0


def other_calls(peer: Peer) -> int:
    """Call the status, request missing models, pull models without reading them, and call unknown methods."""
    calls: list[Callable[[], object]] = [
        lambda: ObserverStub(peer.channel).GetStatus(pb.GetStatusRequest(job_uid=UID), timeout=CALL_SECONDS)
    ]
    calls += [lambda: list(peer.stub.Pull(pb.PullRequest(digest=ESCAPES), timeout=CALL_SECONDS))] * 20
    unknown: Any = peer.channel.unary_unary("/no.such/Method")
    calls += [lambda: unknown(b"x" * 1000, timeout=CALL_SECONDS)] * 20
    for call in calls:
        with suppress(*_REFUSED_CALLS):
            call()
    unread: list[Any] = [peer.stub.Pull(pb.PullRequest(digest=peer.digest)) for _ in range(20)]
    time.sleep(HELD_SECONDS)
    for each in unread:
        each.cancel()
    return 0


MESSAGES: tuple[Attack, ...] = (
    bad_values, bad_tensors, bad_words, bad_streams, another_client, another_round, huge_evaluations, junk_text,
    message_flood, push_flood, slow_push, come_and_go, many_connections, other_calls,
)  # fmt: skip
