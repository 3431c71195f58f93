"""The HTTP proxy on the way to a gateway, where a site's network lets nothing out but through one (CONNECT)."""

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
    """There is no way through it. ``strerror`` is one line, without the proxy's password."""

    def __init__(self, message: str) -> None:
        super().__init__(None, message)


def proxy_for(gateway: GatewaySettings) -> str | None:
    """The proxy's URL: the policy's, or what ``https_proxy`` says; None: no proxy. Raises :class:`ProxyError`."""
    found = urllib.request.getproxies_environment()
    # In either case: gRPC obeys it by itself.
    if urllib.request.proxy_bypass_environment(gateway.address, found):  # type: ignore[attr-defined]
        return None
    if gateway.proxy is not None:
        return gateway.proxy
    url = found.get("https", "")
    if not url:
        return None
    url = url if "://" in url else f"http://{url}"
    if PROXY.fullmatch(url) is None:
        # Not the text itself: it may hold a password.
        raise ProxyError("https_proxy is not http://HOST:PORT")
    return url.rstrip("/")


def shown(url: str) -> str:
    """The same for people, without user and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def connect(gateway: GatewaySettings, seconds: float) -> socket.socket:
    """A connection to the gateway, through the proxy if there is one. Raises ``OSError``."""
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
    # Python before 3.12 puts no brackets around an IPv6 address; later ones leave those that are there.
    tunnel.set_tunnel(f"[{host}]" if ":" in host else host, port, headers)
    try:
        tunnel.connect()
    except (OSError, http.client.HTTPException) as error:
        tunnel.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ProxyError(f"proxy {shown(url)}: {' '.join(why.split())}") from None
    plain: socket.socket = tunnel.sock
    # The connection's own object must not close it.
    tunnel.sock = None
    return plain
