"""Barrier between rounds, so that several systems take turns on one machine.

A program of clients writes a byte to its standard output for each client that arrives at the barrier. Each byte on its
standard input releases every client once. The program exits when its standard input ends.
"""

import os
import subprocess
import threading
import time

_ARRIVED = b"."


class Barrier:
    """Clients' side. Create it before the processes fork; every process must call :meth:`watch`."""

    def __init__(self, processes: int) -> None:
        self._pipes = [os.pipe() for _ in range(processes)]
        self._waiting: dict[int, threading.Semaphore] = {}

    def distribute(self) -> None:
        """Start a thread in the first process that passes the input on to the others."""
        threading.Thread(target=self._distribute, daemon=True).start()

    def watch(self, process: int, clients: range) -> None:
        """Start a thread in a process of clients that waits for its releases."""
        for number, (read, write) in enumerate(self._pipes):
            os.close(write)
            if number != process:
                os.close(read)
        self._waiting = {client: threading.Semaphore(0) for client in clients}
        threading.Thread(target=self._listen, args=[self._pipes[process][0]], daemon=True).start()

    def wait(self, client: int) -> None:
        """Wait until the barrier releases this client."""
        os.write(1, _ARRIVED)
        self._waiting[client].acquire()

    def _distribute(self) -> None:
        while data := os.read(0, 4096):
            for _, write in self._pipes:
                os.write(write, data)
        for _, write in self._pipes:
            os.close(write)

    def _listen(self, read: int) -> None:
        while data := os.read(read, 4096):
            for semaphore in self._waiting.values():
                semaphore.release(len(data))
        os._exit(0)


class BarrierController:
    """Benchmark's side of a :class:`Barrier`."""

    def __init__(self, program: subprocess.Popen[bytes], clients: int) -> None:
        self._program = program
        self._clients = clients

    def await_all(self, times: int = 1) -> None:
        """Wait until every client has arrived ``times`` times. Raises ``RuntimeError`` if the clients end."""
        assert self._program.stdout is not None
        missing = self._clients * times
        while missing:
            data = self._program.stdout.read(missing)
            if not data:
                raise RuntimeError("the clients have ended")
            missing -= len(data)

    def run(self, rounds: int) -> float:
        """Run this number of rounds and return their duration in seconds."""
        started = time.perf_counter()
        self.release(rounds)
        self.await_all(rounds)
        return time.perf_counter() - started

    def release(self, times: int = 1) -> None:
        """Let every client pass the barrier ``times`` times."""
        assert self._program.stdin is not None
        self._program.stdin.write(_ARRIVED * times)
