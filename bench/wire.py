"""Push and pull of one client, compared with bare gRPC streams and a TCP connection of the same bytes, in alternation.

``python -m bench.wire``: a JSON line for each size. Pull and push are timed at the client, from the call to the model's
tensors or to the aggregator's answer; TCP is unencrypted; gRPC and Isthmus use mutual TLS.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isthmus.client.context import Context
from isthmus.client.session.compression import ClientCompression
from isthmus.client.session.session import Session
from isthmus.client.session.transfer import FinishedUpdate, pull, push
from isthmus.tensors import State, snapshot
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.transport import channel

from .harness import grpc_baseline
from .harness.aggregator_process import POOL, SERVER_NAME, Job, aggregator, client_environment
from .harness.noop_clients import Weights
from .harness.payload import payload
from .harness.processes import program

SIZES = (10_000, 250_000, 2_500_000, 25_000_000, 100_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="*", default=SIZES)
    parser.add_argument("--repeat", type=int, default=7, help="number of rounds; medians are shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for parameters in options.parameters:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(Path(scratch), parameters, options.repeat)), flush=True)


def measure(directory: Path, parameters: int, repeat: int) -> dict[str, object]:
    """Measure one size."""
    size = parameters * 4
    with (
        aggregator(directory, 1, repeat + 2) as job,
        program("bench.harness.grpc_baseline", str(directory / "server"), "2", str(size)) as server,
        raw_tcp(size) as tcp,
        one_client(job, parameters) as ours,
    ):
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with channel(f"127.0.0.1:{port}", job.client, SERVER_NAME) as connection:
            data = grpc_baseline.chunks(size)
            stream_pull: Any = connection.unary_stream(f"/{grpc_baseline.SERVICE}/Pull")
            stream_push: Any = connection.stream_unary(f"/{grpc_baseline.SERVICE}/Push")

            def bare_pull() -> None:
                for _ in stream_pull(b""):
                    pass

            def bare_push() -> None:
                stream_push(iter(data))

            pulls: list[list[float]] = [[], [], []]
            pushes: list[list[float]] = [[], [], []]
            for turn in range(repeat + 1):
                offer = ours.offer()
                now = [timed(tcp.pull), timed(bare_pull), timed(lambda offer=offer: ours.pull(offer))]  # type: ignore[misc]
                then = [timed(tcp.push), timed(bare_push), timed(lambda offer=offer: ours.push(offer))]  # type: ignore[misc]
                if turn:  # the first call includes the start-up
                    for series, value in zip(pulls + pushes, now + then, strict=True):
                        series.append(value)
    result: dict[str, object] = {"bench": "wire", "model_bytes": size}
    for what, (raw, wire, own) in (("pull", pulls), ("push", pushes)):
        result |= {
            f"{what}_GBps": round(size / statistics.median(own) / 1e9, 4),
            f"{what}_times_bare_grpc": round(statistics.median(a / b for a, b in zip(own, wire, strict=True)), 3),
            f"{what}_times_tcp": round(statistics.median(a / b for a, b in zip(own, raw, strict=True)), 3),
        }
    return result


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class OneClient:
    """Session with separate calls of pull and push."""

    def __init__(self, session: Session, parameters: int) -> None:
        self.session = session
        self._compression = ClientCompression(session)
        self._model = Weights(parameters)
        self._update: State = {}

    def offer(self) -> pb.Offer:
        """Return the next offer to train; submit the initial weights if they are requested."""
        while True:
            message = self.session.incoming.get(timeout=120)
            if isinstance(message, Exception):
                raise message
            match message.offer.kind:
                case pb.Offer.INITIALIZE:
                    self._push(FinishedUpdate(0, "", 1, {}, snapshot(self._model.state_dict())))
                case pb.Offer.TRAIN:
                    return message.offer

    def pull(self, offer: pb.Offer) -> None:
        state = pull(self.session, offer, self._compression, lambda specs: None)
        self._compression.on_pulled(offer, state, self._model.state_dict)
        self._update = state

    def push(self, offer: pb.Offer) -> None:
        self._push(FinishedUpdate(offer.round, offer.base_digest, 1, {}, self._update))

    def _push(self, update: FinishedUpdate) -> None:
        reply = push(self.session, update)
        if reply.verdict != pb.PushReply.ACCEPTED:
            raise RuntimeError(reply.message)


@contextmanager
def one_client(job: Job, parameters: int) -> Iterator[OneClient]:
    os.environ.update(client_environment(job))
    session = Session(Context(POOL, 0, 1, 0, 1), evaluates=False, stopping=threading.Event())
    try:
        yield OneClient(session, parameters)
    finally:
        session.close()


class RawTcp:
    """TCP connection on loopback."""

    def __init__(self, size: int) -> None:
        self._data, self._room = payload(size), bytearray(size)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._client = socket.create_connection(self._server.getsockname())
        self._peer, _ = self._server.accept()
        self._peer_room = bytearray(size)

    def pull(self) -> None:
        self._one_way(self._peer, self._client, self._room)

    def push(self) -> None:
        self._one_way(self._client, self._peer, self._peer_room)

    def _one_way(self, sender: socket.socket, receiver: socket.socket, room: bytearray) -> None:
        sending = threading.Thread(target=sender.sendall, args=[self._data])
        sending.start()
        view = memoryview(room)
        while view:
            view = view[receiver.recv_into(view) :]
        sending.join()

    def close(self) -> None:
        for end in (self._client, self._peer, self._server):
            end.close()


@contextmanager
def raw_tcp(size: int) -> Iterator[RawTcp]:
    connection = RawTcp(size)
    try:
        yield connection
    finally:
        connection.close()


if __name__ == "__main__":
    main()
