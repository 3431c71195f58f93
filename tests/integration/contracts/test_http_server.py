"""Servers of /metrics and of probes: connections that strangers keep open neither add threads nor block others."""

import socket
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from isthmus_contracts.wire import http_server
from isthmus_contracts.wire.http_server import CONNECTIONS, serve_metrics


def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [b"isthmus_up 1\n"]


@pytest.fixture
def port() -> Iterator[int]:
    server = serve_metrics(application, "127.0.0.1", 0)
    yield server.server_port
    server.shutdown()
    server.server_close()


def scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        content: bytes = answer.read()
        return content


def test_silent_connections_make_room(port: int) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            for _ in range(3 * CONNECTIONS)
        ]
        # The oldest are closed, a request is answered, and the number of threads stays small.
        for one in silent[: 2 * CONNECTIONS]:
            assert one.recv(1) == b""
        assert scrape(port) == b"isthmus_up 1\n"
        assert threading.active_count() - before <= CONNECTIONS + http_server._ENDING


def test_a_silent_connection_ends_by_itself(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(http_server, "IDLE_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
        silent.sendall(b"GET /metrics HTTP/1.0\r\n")
        assert silent.recv(100) == b""
