"""Creation of a site's certificates: a CA, the bridge's own, one for each cluster's operator; and its signing root."""

import datetime as dt
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus_contracts.identities import CA_FILE, operator_identity
from isthmus_contracts.wire.pki import Authority, Credentials, certificates_in

from ..parties import signing_root

CA_DAYS = 3650
SERVER = "server"


def make(
    directory: Path,
    hosts: Sequence[str],
    clusters: Sequence[str],
    lifetime: dt.timedelta,
    *,
    new_ca: bool = False,
    only_this_ca: bool = False,
) -> Iterator[str]:
    """Write the certificates, and yield a line for each. An existing CA is used again, as is the site's signing root.

    ``new_ca``: replace it; the earlier CA stays trusted, and the bridge's own certificate, which operators cannot
    verify before they trust the new CA, does not change. ``only_this_ca``: stop trusting earlier CAs. Raises
    ``OSError`` and ``ValueError``.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = directory / CA_FILE, directory / "ca.key"
    # Decide by ca.crt, not by ca.key, which may be stored elsewhere: never replace a CA in use without --new-ca.
    trusted = certificates_in(certificate.read_bytes()) if certificate.exists() else []
    if not new_ca and certificate.exists() != key.exists():
        missing = key if certificate.exists() else certificate
        raise ValueError(f"{missing.name} is missing: put it there temporarily, or create a new CA with --new-ca")
    if trusted and not new_ca:
        authority = Authority.load(trusted[0], key.read_bytes())
        if only_this_ca:
            trusted = trusted[:1]
        yield f"site CA: {certificate} (kept)"
    else:
        # A unique name, since some TLS libraries find the signer by its name alone.
        authority = Authority.create(f"isthmus site CA {secrets.token_hex(4)}", dt.timedelta(days=CA_DAYS))
        trusted = [authority.certificate, *trusted]
        _write_private(key, authority.key)
        yield f"site CA: {certificate}; keep {key} safe: it gives access to submit jobs here"
    bundle = b"".join(trusted)
    certificate.write_bytes(bundle)
    if hosts:
        public, fresh = signing_root.make(directory)
        _trusting(authority.issue(hosts[0], lifetime, hosts=hosts), bundle).write(directory / SERVER)
        yield f"the bridge's own, for {', '.join(hosts)}: {directory / SERVER}; set it as tls_dir in the policy"
        signing_root.install(directory, directory / SERVER)
        kept = "created; keep it as safe as the CA's key" if fresh else "kept"
        yield f"the site's root for secure aggregation: {directory / signing_root.KEY_FILE} ({kept})"
        yield f"other sites trust it as {public}"
    elif (directory / SERVER / CA_FILE).exists():
        (directory / SERVER / CA_FILE).write_bytes(bundle)
        if new_ca:
            yield f"the bridge trusts both CAs ({directory / SERVER / CA_FILE}), and keeps its certificate for now"
    for cluster in clusters:
        identity = operator_identity(cluster)
        target = directory / f"operator-{cluster}"
        _trusting(authority.issue(cluster, lifetime, uris=[identity]), bundle).write(target)
        yield f"for the operator of {cluster}: {target}; name {identity} in the policy"


def _trusting(credentials: Credentials, bundle: bytes) -> Credentials:
    return Credentials(bundle, credentials.certificate, credentials.key)


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
