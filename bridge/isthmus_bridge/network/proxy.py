"""Connections to a gateway through an HTTP proxy (CONNECT), for sites whose network allows no others."""

import base64
import http.client
import re
import socket
import urllib.parse
import urllib.request

from isthmus_contracts.wire.addresses import split

from ..policy.fields import PROXY
from ..policy.policy import GatewaySettings


class ProxyError(OSError):
    """The proxy cannot be used. ``strerror`` is one line, without the proxy's password."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


def proxy_for(gateway: GatewaySettings) -> str | None:
    """Return the proxy's URL from the policy or ``https_proxy``; ``None`` for no proxy. Raises :class:`ProxyError`."""
    found = urllib.request.getproxies_environment()
    # no_proxy applies to both, since gRPC obeys it by itself.
    if urllib.request.proxy_bypass_environment(gateway.address, found):  # type: ignore[attr-defined]
        return None
    if gateway.proxy is not None:
        return gateway.proxy
    url = found.get("https", "")
    if not url:
        return None
    url = url if "://" in url else f"http://{url}"
    if PROXY.fullmatch(url) is None:
        # Do not quote the text: it may hold a password.
        raise ProxyError("https_proxy is not http://HOST:PORT")
    return url.rstrip("/")


def shown(url: str) -> str:
    """Return the URL without user and password, to be shown."""
    return re.sub(r"//[^/@]*@", "//", url)


def connect(gateway: GatewaySettings, seconds: float) -> socket.socket:
    """Connect to the gateway, through the proxy if there is one. Raises ``OSError``."""
    host, port = split(gateway.address)
    url = proxy_for(gateway)
    if url is None:
        return socket.create_connection((host, port), seconds)
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    headers = {}
    if parts.username is not None:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode('ascii')}"
    tunnel = http.client.HTTPConnection(parts.hostname, parts.port, timeout=seconds)
    # Python before 3.12 adds no brackets to an IPv6 address; later versions keep existing ones.
    tunnel.set_tunnel(f"[{host}]" if ":" in host else host, port, headers)
    try:
        tunnel.connect()
    except (OSError, http.client.HTTPException) as error:
        tunnel.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ProxyError(f"proxy {shown(url)}: {' '.join(why.split())}") from None
    plain: socket.socket = tunnel.sock
    # Detach the socket, so that the HTTPConnection does not close it.
    tunnel.sock = None
    return plain
