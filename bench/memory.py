"""Peak memory of an aggregator by number of clients, and of the client library in addition to the script's model.

``python -m bench.memory --clients 4 16 64``; ``python -m bench.memory --library``. Each prints JSON lines. The
aggregator's clients have no model, so that many fit on one machine; each pulls and pushes in every round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import xxhash

from isthmus.client.context import Context
from isthmus.client.loop.client_loop import ClientLoop
from isthmus.client.loop.ranks import Ranks
from isthmus.tensors import chunk_bytes, specs_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import FederationStub
from isthmus_contracts.wire.transport import channel

from .harness.aggregator_process import (
    POOL,
    SERVER_NAME,
    UID,
    Job,
    aggregator,
    client_environment,
    connections_of_their_own,
    peak_memory,
)
from .harness.noop_clients import Weights

CHAINS = ("None", "Int8", "TopK+Int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--parameters", type=int, default=100_000_000, help="float32 parameters of the model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--library", action="store_true", help="measure the client library instead")
    parser.add_argument("--chains", nargs="*", default=CHAINS, help="codecs of the library's uploads")
    parser.add_argument("--participate", choices=["alone", "federated"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.participate:
        participate(options.parameters, federated=options.participate == "federated")
    elif options.library:
        for chain in options.chains:
            print(json.dumps(library(options.parameters, chain)), flush=True)
    else:
        fewest = 0
        for clients in options.clients:
            peak = server(clients, options.parameters, options.rounds)
            fewest = fewest or peak
            size = options.parameters * 4
            bound = int(2.5 * size + 400e6)
            line = {
                "bench": "memory",
                "clients": clients,
                "model_bytes": size,
                "aggregator_peak_bytes": peak,
                "of_models": round(peak / size, 3),
                "of_fewest_clients": round(peak / fewest, 3),
                "bound_bytes": bound,
                "of_bound": round(peak / bound, 3),
            }
            print(json.dumps(line), flush=True)


def server(clients: int, parameters: int, rounds: int) -> int:
    """Return the peak memory of an aggregator."""
    connections_of_their_own()
    with tempfile.TemporaryDirectory() as scratch, aggregator(Path(scratch), clients, rounds) as job:
        with ThreadPoolExecutor(clients) as pool:
            calls = [pool.submit(by_hand, job, index, clients, parameters) for index in range(clients)]
            for done in as_completed(calls):
                done.result()
        return job.peak_memory()


def by_hand(job: Job, index: int, clients: int, parameters: int) -> None:
    """Run a client without a model: it discards what it pulls and pushes zeros."""
    size = parameters * 4
    specs = specs_of(Weights(parameters, "meta").tensors)
    piece = bytes(chunk_bytes(clients))  # as the library does it
    digest = xxhash.xxh3_128()
    for chunk in zeros(piece, size):
        digest.update(chunk)
    with channel(f"127.0.0.1:{job.port}", job.client, SERVER_NAME) as connection:
        stub = FederationStub(connection)
        over = threading.Event()

        def hello() -> Iterator[pb.ClientMessage]:
            yield pb.ClientMessage(hello=pb.Hello(job_uid=UID, pool=POOL, index=index, instance=str(index)))
            over.wait()

        def update(header: pb.UpdateHeader, pushing: "Future[Any]") -> Iterator[pb.UpdateChunk]:
            yield pb.UpdateChunk(header=header)
            pushing.result().initial_metadata()  # as in the library: the rest is allocated
            for chunk in zeros(piece, size):
                yield pb.UpdateChunk(data=bytes(chunk))
            yield pb.UpdateChunk(trailer=pb.Trailer(checksum=digest.hexdigest()))

        for message in stub.Control(hello()):
            offer = message.offer
            if offer.kind == pb.Offer.TRAIN:
                for _ in stub.Pull(pb.PullRequest(job_uid=UID, round=offer.base_round, digest=offer.base_digest)):
                    pass
            if offer.kind in (pb.Offer.TRAIN, pb.Offer.INITIALIZE):
                header = pb.UpdateHeader(
                    job_uid=UID, pool=POOL, index=index, instance=str(index), round=offer.round, num_examples=1,
                    base_digest=offer.base_digest, tensors=specs,
                )  # fmt: skip
                pushing: Future[Any] = Future()
                pushing.set_result(stub.Push.future(update(header, pushing)))
                reply = pushing.result().result()
                if reply.verdict != pb.PushReply.ACCEPTED:
                    raise RuntimeError(reply.message)
        over.set()


def zeros(piece: bytes, size: int) -> Iterable[memoryview]:
    return (memoryview(piece)[: size - start] for start in range(0, size, len(piece)))


def library(parameters: int, chain: str) -> dict[str, object]:
    """Return the peak memory of a script with a model, alone and as a client, in a round without an optimizer."""
    command = [sys.executable, "-m", "bench.memory", "--parameters", str(parameters), "--participate"]
    alone = int(subprocess.run([*command, "alone"], check=True, capture_output=True).stdout)
    with (
        tempfile.TemporaryDirectory() as scratch,
        aggregator(Path(scratch), 1, 3, compression={"upload": chain}) as job,
    ):
        environment = client_environment(job)
        run = subprocess.run([*command, "federated"], check=True, stdout=subprocess.PIPE, env=environment)
    size = parameters * 4
    beyond = int(run.stdout) - alone
    return {
        "bench": "client_memory",
        "upload": chain,
        "model_bytes": size,
        "beyond_own_bytes": beyond,
        "of_models": round(beyond / size, 3),
        "of_bound": round(beyond / (2 * size), 3),
    }


def participate(parameters: int, *, federated: bool) -> None:
    """Run a script with a model and print its peak memory."""
    torch.set_num_threads(1)
    model = Weights(parameters)
    for tensor in model.tensors.values():
        tensor.fill_(0.5)
    if federated:
        part = ClientLoop(model, None, None, Context(POOL, 0, 1, 0, 1), Ranks(), threading.Event())
        for rnd in part.rounds():
            for tensor in model.tensors.values():
                tensor.add_(0.001)
            rnd.submit(num_examples=1)
    print(peak_memory(os.getpid()))


if __name__ == "__main__":
    main()
