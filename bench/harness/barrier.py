"""A barrier in each round, so that the rounds of several systems take turns on one machine.

A program of clients shows an arrival at the barrier by a byte on its standard output; each byte on its standard input
lets every client through once. When the input ends, so does the program.
"""

import os
import subprocess
import threading
import time

_ARRIVED = b"."


class Barrier:
    """The clients' side, to be made before the processes fork; every process must :meth:`watch`."""

    def __init__(self, processes: int) -> None:
        self._pipes = [os.pipe() for _ in range(processes)]
        self._waiting: dict[int, threading.Semaphore] = {}

    def distribute(self) -> None:
        """In the first process: hands the input on to the others, in a thread."""
        threading.Thread(target=self._distribute, daemon=True).start()

    def watch(self, process: int, clients: range) -> None:
        """In a process of clients: listens for its clients, in a thread."""
        for number, (read, write) in enumerate(self._pipes):
            os.close(write)
            if number != process:
                os.close(read)
        self._waiting = {client: threading.Semaphore(0) for client in clients}
        threading.Thread(target=self._listen, args=[self._pipes[process][0]], daemon=True).start()

    def wait(self, client: int) -> None:
        """Waits until the barrier lets this client through."""
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
    """The benchmark's side."""

    def __init__(self, program: subprocess.Popen[bytes], clients: int) -> None:
        self._program = program
        self._clients = clients

    def await_all(self, times: int = 1) -> None:
        """Waits until every client has come to the barrier so many times. Raises ``RuntimeError`` if they end."""
        assert self._program.stdout is not None
        missing = self._clients * times
        while missing:
            data = self._program.stdout.read(missing)
            if not data:
                raise RuntimeError("the clients have ended")
            missing -= len(data)

    def run(self, rounds: int) -> float:
        """Lets all through so many times, and times it until they are back at the barrier."""
        assert self._program.stdin is not None
        started = time.perf_counter()
        self._program.stdin.write(_ARRIVED * rounds)
        self.await_all(rounds)
        return time.perf_counter() - started
