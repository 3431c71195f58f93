"""A proxy to the API server that a test can cut, or silence like a firewall that dropped its connection state."""

import contextlib
import select
import socket
import threading
from typing import Self


class Proxy:
    """Proxy that forwards TCP connections, including TLS, to one address."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._silent: set[tuple[socket.socket, socket.socket]] = set()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._listener.close()
        with self._lock:
            for pair in self._pairs | self._silent:
                _close(pair)

    def cut(self) -> int:
        """Close all connections and return their number; new ones are accepted."""
        with self._lock:
            for pair in self._pairs:
                _shut(pair)
            return len(self._pairs)

    def silence(self) -> int:
        """Silence the open connections without closing them, and return their number."""
        with self._lock:
            self._silent |= self._pairs
            return len(self._pairs)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=30)
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._pass, args=((near, far),), daemon=True).start()

    def _pass(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.add(pair)
        other = dict(zip(pair, reversed(pair), strict=True))
        with contextlib.suppress(OSError, ValueError):
            while True:
                ready, _, _ = select.select(pair, (), (), 1)
                if pair in self._silent:
                    return  # both sides stay open and receive nothing
                for end in ready:
                    if not (data := end.recv(1 << 16)):
                        raise OSError("closed")
                    if pair in self._silent:
                        return
                    other[end].sendall(data)
        with self._lock:
            self._pairs.discard(pair)
            if pair not in self._silent:
                _close(pair)


def _shut(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _close(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        end.close()
