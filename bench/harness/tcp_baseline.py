"""Baseline of unencrypted TCP with the same bytes: the cost of moving them on this machine.

A server process sends every client the bytes; each client sends the same number back.
"""

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .barrier import Barrier, BarrierController
from .payload import payload
from .processes import Peers, in_processes, program

_ROOM = 1 << 20


@contextmanager
def running(clients: int, processes: int, size: int) -> Iterator[Peers]:
    """Start server and clients, which wait at the barrier."""
    with program("bench.harness.tcp_baseline", "server", str(clients), str(size)) as server:
        assert server.stdout is not None
        port = server.stdout.readline().decode().strip()
        with program("bench.harness.tcp_baseline", "clients", port, str(clients), str(processes), str(size)) as peers:
            barrier = BarrierController(peers, clients)
            barrier.await_all()
            yield Peers(barrier, (server.pid, peers.pid))


def serve(clients: int, size: int) -> None:
    """Serve rounds until the clients end: each gets the bytes and sends the same number; the next begins after all."""
    data = payload(size)
    all_have_sent = threading.Barrier(clients)

    def attend(connection: socket.socket) -> None:
        room = bytearray(_ROOM)
        with suppress(EOFError, OSError):  # the clients have ended
            while True:
                all_have_sent.wait()
                connection.sendall(data)
                receive(connection, size, room)

    with socket.create_server(("127.0.0.1", 0), backlog=clients) as listener:
        print(listener.getsockname()[1], flush=True)
        for _ in range(clients):
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=attend, args=[connection], daemon=True).start()
    sys.stdin.buffer.read()


def participate(index: int, port: int, size: int, barrier: Barrier) -> None:
    data = payload(size)
    room = bytearray(_ROOM)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            receive(connection, size, room)
            barrier.wait(index)
            connection.sendall(data)


def receive(connection: socket.socket, size: int, room: bytearray) -> None:
    """Read and discard this number of bytes. Raises ``EOFError``."""
    view = memoryview(room)
    while size:
        if not (count := connection.recv_into(view, min(size, len(room)))):
            raise EOFError
        size -= count


def main() -> None:
    if sys.argv[1] == "server":
        serve(*map(int, sys.argv[2:]))
        return
    port, clients, processes, size = map(int, sys.argv[2:])
    barrier = Barrier(processes)
    in_processes(clients, processes, lambda index: participate(index, port, size, barrier), barrier)


if __name__ == "__main__":
    main()
