"""A small HTTP proxy that supports only CONNECT, as many sites use for outbound connections."""

import base64
import socket
import socketserver
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self


class ConnectProxy:
    """Proxy that connects clients to the hosts it knows, and records the requests."""

    def __init__(self, hosts: Mapping[str, tuple[str, int]], secret: str = "") -> None:
        """Start the proxy.

        ``hosts`` maps each HOST:PORT to its real address. ``secret`` is the required user:password, if any.
        """
        self.hosts = dict(hosts)
        self.asked: list[tuple[str, int]] = []
        """HOST:PORT and the status of the answer, for each request."""
        self._wanted = f"Basic {base64.b64encode(secret.encode()).decode()}" if secret else ""
        self._open: list[socket.socket] = []
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            """Connection of one client."""

            def handle(self) -> None:
                outer.serve(self)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def serve(self, client: socketserver.StreamRequestHandler) -> None:
        """Answer one request, and forward bytes until an end closes."""
        method, target, _ = client.rfile.readline(4096).decode().split()
        headers = {}
        while line := client.rfile.readline(4096).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        status = 200 if method == "CONNECT" else 405
        if self._wanted and headers.get("proxy-authorization") != self._wanted:
            status = 407
        elif target not in self.hosts:
            status = 403
        self.asked.append((target, status))
        client.wfile.write(f"HTTP/1.1 {status} {'as asked' if status == 200 else 'no'}\r\n\r\n".encode())
        if status != 200:
            return
        with socket.create_connection(self.hosts[target]) as there:
            self._open += [there, client.connection]
            threading.Thread(target=_pass_on, args=(there, client.connection), daemon=True).start()
            _pass_on(client.connection, there)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
