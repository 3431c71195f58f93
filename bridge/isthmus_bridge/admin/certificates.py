"""Makes a site's certificates: a CA, the bridge's own, and one for each cluster's operator."""

import datetime as dt
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus_contracts.identities import CA_FILE, operator_identity
from isthmus_contracts.wire.pki import Authority, Credentials, certificates_in

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
    """Writes them and tells what it wrote, line by line. An authority that is there signs again.

    ``new_ca``: one that takes its place; the earlier one stays trusted, and the bridge's own certificate, which
    operators cannot check before they know the new one, stays as it is. ``only_this_ca``: those before it are no
    longer trusted. Raises ``OSError`` and ``ValueError``.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = directory / CA_FILE, directory / "ca.key"
    # By ca.crt, not by ca.key, which may be kept elsewhere: a CA that is in use is never replaced unasked.
    trusted = certificates_in(certificate.read_bytes()) if certificate.exists() else []
    if not new_ca and certificate.exists() != key.exists():
        missing = key if certificate.exists() else certificate
        raise ValueError(f"{missing.name} is not there: put it there for the moment, or make a new CA with --new-ca")
    if trusted and not new_ca:
        authority = Authority.load(trusted[0], key.read_bytes())
        if only_this_ca:
            trusted = trusted[:1]
        yield f"site CA: {certificate} (was there)"
    else:
        # A name of its own: some TLS libraries find the signer by that alone.
        authority = Authority.create(f"isthmus site CA {secrets.token_hex(4)}", dt.timedelta(days=CA_DAYS))
        trusted = [authority.certificate, *trusted]
        _write_private(key, authority.key)
        yield f"site CA: {certificate}; keep {key} safe: whoever has it can submit here"
    bundle = b"".join(trusted)
    certificate.write_bytes(bundle)
    if hosts:
        _trusting(authority.issue(hosts[0], lifetime, hosts=hosts), bundle).write(directory / SERVER)
        yield f"the bridge's own, for {', '.join(hosts)}: {directory / SERVER}; name it as tls_dir in the policy"
    elif (directory / SERVER / CA_FILE).exists():
        (directory / SERVER / CA_FILE).write_bytes(bundle)
        if new_ca:
            yield f"the bridge trusts both CAs, by {directory / SERVER / CA_FILE}, and keeps its certificate for now"
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
