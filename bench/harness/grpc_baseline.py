"""Baseline of bare gRPC with the same certificates, bytes and pattern of calls: the cost of the connection alone.

A server process sends every client a "go" on its control stream; each client pulls the bytes and pushes the same
number back.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import SERVER_OPTIONS, channel, server_credentials

from .aggregator_process import SERVER_NAME, Job, connections_of_their_own
from .barrier import Barrier, BarrierController
from .payload import payload
from .processes import Peers, in_processes, program

CHUNK = 1 << 20
SERVICE = "bench.Bare"


@contextmanager
def running(job: Job, clients: int, processes: int, size: int) -> Iterator[Peers]:
    """Start server and clients, which wait at the barrier."""
    with program("bench.harness.grpc_baseline", str(job.directory / "server"), str(clients), str(size)) as server:
        assert server.stdout is not None
        port = server.stdout.readline().decode().strip()
        arguments = ("clients", str(job.directory / "client"), port, str(clients), str(processes), str(size))
        with program("bench.harness.grpc_baseline", *arguments) as peers:
            barrier = BarrierController(peers, clients)
            barrier.await_all()
            yield Peers(barrier, (server.pid, peers.pid))


async def serve(directory: Path, clients: int, size: int) -> None:
    """Serve rounds until the process ends: each client pulls and pushes; then the next round begins."""
    data = chunks(size)
    goes: list[asyncio.Queue[bytes]] = []
    waiting = 0

    def go() -> None:
        nonlocal waiting
        waiting = clients
        for queue in goes:
            queue.put_nowait(b"go")

    async def control(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        mine: asyncio.Queue[bytes] = asyncio.Queue()
        goes.append(mine)
        if len(goes) == clients:
            go()
        while True:
            yield await mine.get()

    async def pull(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for chunk in data:
            yield chunk

    async def push(requests: AsyncIterator[bytes], context: Any) -> bytes:
        nonlocal waiting
        async for _ in requests:
            pass
        waiting -= 1
        if waiting == 0:
            go()
        return b"ok"

    server = aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                SERVICE,
                {
                    "Control": grpc.stream_stream_rpc_method_handler(control),
                    "Pull": grpc.unary_stream_rpc_method_handler(pull),
                    "Push": grpc.stream_unary_rpc_method_handler(push),
                },
            ),
        )
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(Credentials.read(directory)))
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await server.stop(0)


def chunks(size: int) -> list[bytes]:
    return [payload(min(CHUNK, size - start)) for start in range(0, size, CHUNK)]


def participate(index: int, directory: Path, port: int, size: int, barrier: Barrier) -> None:
    data = chunks(size)
    with channel(f"127.0.0.1:{port}", Credentials.read(directory), SERVER_NAME) as connection:
        control: Any = connection.stream_stream(f"/{SERVICE}/Control")
        pull: Any = connection.unary_stream(f"/{SERVICE}/Pull")
        push: Any = connection.stream_unary(f"/{SERVICE}/Push")

        def hello() -> Iterator[bytes]:
            yield b"hello"
            threading.Event().wait()

        for _ in control(hello(), wait_for_ready=True):
            for _ in pull(b""):
                pass
            barrier.wait(index)
            push(iter(data))


def main() -> None:
    if sys.argv[1] != "clients":
        asyncio.run(serve(Path(sys.argv[1]), *map(int, sys.argv[2:])))
        return
    directory, port, clients, processes, size = Path(sys.argv[2]), *map(int, sys.argv[3:])
    connections_of_their_own()
    barrier = Barrier(processes)
    in_processes(clients, processes, lambda index: participate(index, directory, port, size, barrier), barrier)


if __name__ == "__main__":
    main()
