"""Check that a gateway can be reached from this machine, and that its certificate is valid."""

import ssl
from pathlib import Path

from isthmus_contracts.wire.addresses import split

from ..policy.policy import GatewaySettings
from .proxy import connect, proxy_for, shown

_SECONDS = 10.0


def reach(gateway: GatewaySettings, tls_dir: Path) -> tuple[bool, str]:
    """Return (reachable, message). Connect without opening a tunnel, so that a running bridge keeps its own."""
    host = split(gateway.address)[0]
    where = f"gateway {gateway.address}"
    try:
        authority = gateway.authority_file(tls_dir)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        if authority is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        return False, f"{where}: its CA file cannot be read: {error}"
    try:
        with (
            connect(gateway, _SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=gateway.server_name or host) as secure,
        ):
            if secure.selected_alpn_protocol() != "h2":
                return False, f"{where}: speaks TLS, but not gRPC: does a proxy in between terminate TLS?"
    except ssl.SSLCertVerificationError as error:
        signer = authority or "the public CAs"
        return False, f"{where}: its certificate is invalid: {error.verify_message} (checked with {signer})"
    except OSError as error:
        return False, f"{where}: cannot be reached: {error.strerror or error}"
    through = f" through the proxy {shown(proxy)}" if (proxy := proxy_for(gateway)) else ""
    return True, f"{where}: can be reached{through}, and its certificate is valid"
