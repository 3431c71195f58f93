"""HTTP servers for ``/metrics`` and probes. Connections are limited in number and time, since any host may connect."""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from .addresses import unbound

CONNECTIONS = 16
"""Maximum number of simultaneous connections. A further one closes the oldest: an honest request takes milliseconds."""
IDLE_SECONDS = 15.0
"""Timeout of an idle connection."""
# Maximum number of threads that have not noticed yet that their connection was closed. Beyond it, new connections are
# closed at once.
_ENDING = 48


class BoundedThreads(ThreadingMixIn):
    """Mix-in for a ``socketserver.TCPServer`` with one thread per connection, up to a limit."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._lock = threading.Lock()
        self._connections: dict[int, socket.socket] = {}  # the oldest first
        self._running = 0

    def server_bind(self) -> None:
        """Bind in the host's address family, or in both for ``::``."""
        server: Any = self
        host, port = server.server_address[:2]
        server.socket.close()
        server.socket, host = unbound(host)
        server.server_address = (host, port)
        super().server_bind()  # type: ignore[misc]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection; if there are too many, close the oldest one."""
        with self._lock:
            if self._running >= CONNECTIONS + _ENDING:
                self.shutdown_request(request)  # type: ignore[attr-defined]
                return
            if len(self._connections) >= CONNECTIONS:
                oldest = self._connections.pop(next(iter(self._connections)))
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._connections[id(request)] = request
            self._running += 1
        request.settimeout(IDLE_SECONDS)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._running -= 1
                if self._connections.get(id(request)) is request:
                    del self._connections[id(request)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of connections that broke or were closed."""


class _MetricsServer(BoundedThreads, WSGIServer):
    pass


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve_metrics(application: Callable[..., Iterable[bytes]], host: str, port: int) -> WSGIServer:
    """Serve a WSGI application in a thread until ``shutdown()``; port 0 chooses a free one. Raises ``OSError``."""
    server = make_server(host, port, application, _MetricsServer, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
