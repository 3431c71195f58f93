"""``host:port`` in both address families, and servers that listen in both."""

import socket
from typing import Any

import pytest

from isthmus_contracts.wire.addresses import ANYWHERE, bound, joined, split, unbound
from isthmus_contracts.wire.http_server import serve_metrics


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.0.0.0:80", ("0.0.0.0", 80)),  # noqa: S104
        ("[::]:8080", ("::", 8080)),
        ("[2001:db8::7]:7443", ("2001:db8::7", 7443)),
        ("gateway.example:0", ("gateway.example", 0)),
    ],
)
def test_splitting_and_joining_addresses(text: str, parts: tuple[str, int]) -> None:
    assert split(text) == parts
    assert joined(*parts) == text


@pytest.mark.parametrize("text", ["8080", ":8080", "[]:80", "h:", "h:http", "h:65536", "h:-1", "h:²"])
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        split(text)


def test_the_error_for_an_ipv6_address_mentions_the_brackets() -> None:
    with pytest.raises(ValueError, match=r"an IPv6 address goes into brackets, as in \[::1\]:8080"):
        split("fd00::7:8080")


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


HOSTS = ["127.0.0.1", *(["::1"] if _has_ipv6() else [])]


@pytest.mark.parametrize("host", HOSTS)
def test_everywhere_is_reached_in_both_families(host: str) -> None:
    with bound(split(f"{ANYWHERE}:0")[0], 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        socket.create_connection((host, port), 30).close()
    server = serve_metrics(lambda *_: [b""], "::", 0)
    socket.create_connection((host, server.server_port), 30).close()
    server.shutdown()
    server.server_close()


def test_without_ipv6_everywhere_is_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, kind)

    monkeypatch.setattr("isthmus_contracts.wire.addresses.socket.socket", without)
    made: Any
    made, where = unbound("::")
    made.close()
    assert (made.family, where) == (socket.AF_INET, "0.0.0.0")  # noqa: S104
