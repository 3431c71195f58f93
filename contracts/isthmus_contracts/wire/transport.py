"""gRPC over mutual TLS, with the same settings in all parts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from grpc import aio

from ..identities import CERTIFICATE_FILE, KEY_FILE
from .pki import Credentials

# The header of a model or an update has about 100 bytes per tensor.
HEADER_BYTES = 32 << 20
# Keepalive finds dead peers behind NATs and firewalls within about 40 s; servers allow it even between calls.
_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", HEADER_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # No proxy (unless one is configured) and no lookup of service configurations between the parts.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
]
SERVER_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
    # Limits for hostile peers. An honest one needs three or four simultaneous calls, short headers, a quick handshake.
    # Without the first limit, headers of calls that are being opened take gigabytes.
    ("grpc.max_concurrent_streams", 32),
    ("grpc.max_metadata_size", 4 << 10),
    ("grpc.absolute_max_metadata_size", 8 << 10),
    ("grpc.server_handshake_timeout_ms", 20_000),
]


def server_options(calls: int) -> list[tuple[str, int | str]]:
    """Return :data:`SERVER_OPTIONS` with this limit of simultaneous calls per connection.

    The option is replaced, since gRPC uses the first of two values.
    """
    name = "grpc.max_concurrent_streams"
    return [(option, calls if option == name else value) for option, value in SERVER_OPTIONS]


def server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    """Return the server side of mutual TLS: a client without a certificate of the CA fails in the handshake."""
    return grpc.ssl_server_credentials(
        [(credentials.key, credentials.certificate)], root_certificates=credentials.ca, require_client_auth=True
    )


def renewed_server_credentials(directory: Path) -> grpc.ServerCredentials:
    """Return the server side of mutual TLS from files that may be renewed.

    A new connection uses the newest certificate; open ones are not affected. Raises ``OSError``.
    """
    return _renewed(lambda: Credentials.read(directory), clients=True)


def renewed_public_credentials(directory: Path) -> grpc.ServerCredentials:
    """Return the server side of TLS for clients without certificates, from files that may be renewed.

    Raises ``OSError``.
    """

    def read() -> Credentials:
        certificate, key = ((directory / name).read_bytes() for name in (CERTIFICATE_FILE, KEY_FILE))
        return Credentials(b"", certificate, key)

    return _renewed(read, clients=False)


def _renewed(read: Callable[[], Credentials], *, clients: bool) -> grpc.ServerCredentials:
    latest = [read()]

    def newest() -> Any:
        # None keeps the previous configuration; the type stubs of gRPC lack it.
        try:
            found = read()
        except OSError:
            # Files are being replaced or are missing: keep the current ones.
            return None
        if found == latest[0]:
            return None
        latest[0] = found
        return _configuration(found)

    return grpc.dynamic_ssl_server_credentials(_configuration(latest[0]), newest, require_client_authentication=clients)


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    pair = [(credentials.key, credentials.certificate)]
    return grpc.ssl_server_certificate_configuration(pair, root_certificates=credentials.ca or None)


def channel(endpoint: str, credentials: Credentials, server_name: str | None = None) -> grpc.Channel:
    """Return a synchronous channel. ``server_name``: name in the server's certificate, if not the endpoint's host."""
    return grpc.secure_channel(endpoint, _channel_credentials(credentials), options=_options(server_name))


def aio_channel(endpoint: str, credentials: Credentials, server_name: str | None = None) -> aio.Channel:
    """Return an asyncio channel; see :func:`channel`."""
    return aio.secure_channel(endpoint, _channel_credentials(credentials), options=_options(server_name))


def aio_public_channel(
    endpoint: str, authority: bytes | None, server_name: str | None = None, proxy: str | None = None
) -> aio.Channel:
    """Return an asyncio channel without a client certificate. ``authority``: CA in PEM; None for the public CAs.

    ``proxy``: URL of an HTTP proxy (CONNECT), http://[user:password@]host:port, or None.
    """
    options = _options(server_name)
    if proxy is not None:
        options = [option for option in options if option[0] != "grpc.enable_http_proxy"]
        options += [("grpc.enable_http_proxy", 1), ("grpc.http_proxy", proxy)]
    return aio.secure_channel(endpoint, grpc.ssl_channel_credentials(authority), options=options)


def peer_uris(context: grpc.ServicerContext | aio.ServicerContext[Any, Any]) -> Sequence[str]:
    """Return the URIs in the peer's verified certificate, which identify the caller."""
    names = context.auth_context().get("x509_subject_alternative_name", [])
    texts = [name.decode("utf-8", "replace") for name in names if isinstance(name, bytes)]
    return [text for text in texts if urlsplit(text).scheme]


def _channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)


def _options(server_name: str | None) -> list[tuple[str, int | str]]:
    if server_name is None:
        return _CHANNEL_OPTIONS
    return [*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server_name), ("grpc.default_authority", server_name)]
