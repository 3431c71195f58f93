"""Makes a site's certificates: a CA, the bridge's own, and one for each cluster's operator."""

import datetime as dt
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus_contracts.identities import operator_identity
from isthmus_contracts.pki import Authority

CA_LIFETIME = dt.timedelta(days=3650)
SERVER = "server"


def make(directory: Path, hosts: Sequence[str], clusters: Sequence[str], lifetime: dt.timedelta) -> Iterator[str]:
    """Writes them and tells what it wrote, line by line. An authority that is there signs again.

    Raises ``OSError`` and ``ValueError``.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate, key = directory / "ca.crt", directory / "ca.key"
    if key.exists():
        authority = Authority.load(certificate.read_bytes(), key.read_bytes())
        yield f"site CA: {certificate} (was there)"
    else:
        authority = Authority.create("isthmus site CA", CA_LIFETIME)
        key.touch(mode=0o600)
        key.write_bytes(authority.key)
        certificate.write_bytes(authority.certificate)
        yield f"site CA: {certificate}; keep {key} safe: whoever has it can submit here"
    if hosts:
        authority.issue(hosts[0], lifetime, hosts=hosts).write(directory / SERVER)
        yield f"the bridge's own, for {', '.join(hosts)}: {directory / SERVER}; name it as tls_dir in the policy"
    for cluster in clusters:
        identity = operator_identity(cluster)
        target = directory / f"operator-{cluster}"
        authority.issue(cluster, lifetime, uris=[identity]).write(target)
        yield f"for the operator of {cluster}: {target}; name {identity} in the policy"
