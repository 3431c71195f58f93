"""An HTTP request over a UNIX socket, TLS or the loopback, with an overall time limit and a bounded answer."""

import http.client
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(\d{1,5}))?/?")
_UNIX = re.compile(r"unix:(/[^\x00-\x1f\x7f]+)")
_OWN = frozenset({"localhost", "127.0.0.1", "[::1]"})
_CHUNK = 1 << 16


class NotSentError(Exception):
    """The server was unreachable: the request was not sent."""


class BrokenError(Exception):
    """The request was sent, but no complete answer was received."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a server."""

    host: str
    port: int = 0
    tls: bool = False
    socket: Path | None = None


def endpoint(url: str) -> Endpoint:
    """Parse ``unix:/path``, ``https://host[:port]`` or ``http://`` of this machine. Raises ``ValueError``."""
    if match := _UNIX.fullmatch(url):
        return Endpoint("localhost", socket=Path(match[1]))
    match = _URL.fullmatch(url)
    if match is None or int(match[3] or 0) > 65535:
        raise ValueError(f"{url!r} is not unix:/PATH, https://HOST:PORT or http://HOST:PORT")
    tls = match[1] == "https"
    if not tls and match[2] not in _OWN:
        raise ValueError(f"{url!r} would send tokens in the clear; http is for localhost only, use https")
    return Endpoint(match[2], int(match[3] or (443 if tls else 80)), tls)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def exchange(
    to: Endpoint,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: bytes | None,
    timeout: float,
    limit: int,
    ca_file: Path | None = None,
) -> tuple[int, bytes]:
    """Send a request; return status and content of the answer. Raises :class:`NotSentError` and
    :class:`BrokenError`."""
    try:
        connection = _connection(to, timeout, ca_file)
        connection.connect()
    except (OSError, ValueError) as error:
        raise NotSentError(_words(error)) from None
    expired = threading.Event()
    timer = threading.Timer(timeout, _end, (connection.sock, expired))
    timer.daemon = True
    timer.start()
    try:
        connection.request(method, path, body, {**headers, "Connection": "close"})
        response = connection.getresponse()
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > limit:
                raise BrokenError(f"the answer is longer than {limit} bytes")
        # If the body has no length, a closed connection looks like its end.
        if expired.is_set():
            raise BrokenError("no complete answer in time")
        if response.length:
            raise BrokenError("the answer was cut off")
        return response.status, bytes(content)
    except (OSError, http.client.HTTPException) as error:
        raise BrokenError("no answer in time" if expired.is_set() else _words(error)) from None
    finally:
        timer.cancel()
        connection.close()


def _connection(to: Endpoint, timeout: float, ca_file: Path | None) -> http.client.HTTPConnection:
    if to.socket is not None:
        return _UnixConnection(to.socket, timeout)
    host = to.host.strip("[]")
    if not to.tls:
        return http.client.HTTPConnection(host, to.port, timeout=timeout)
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    return http.client.HTTPSConnection(host, to.port, timeout=timeout, context=context)


def _end(connected: socket.socket, expired: threading.Event) -> None:
    expired.set()
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
