"""The site's root for secure aggregation, whose key only the site holds: it signs the keys of the site's clients."""

import os
from pathlib import Path

from isthmus_contracts.process import files
from isthmus_contracts.wire.parties import PartyError, new_root, parse_public, public_root

# In the CA's folder, and in tls_dir beside the bridge's own certificate.
KEY_FILE = "signing-root.key"
# In the CA's folder only.
PUBLIC_FILE = "signing-root.pub"


def read(tls_dir: Path) -> bytes | None:
    """Return the root's private key (PEM); ``None`` if the site has none. Raises ``OSError``."""
    try:
        return (tls_dir / KEY_FILE).read_bytes()
    except FileNotFoundError:
        return None


def public(tls_dir: Path) -> str:
    """Return the root's public key (64 hexadecimal digits); empty if the site has none.

    Raises ``PartyError``, which names the file, and ``OSError``.
    """
    key = read(tls_dir)
    return "" if key is None else _public(tls_dir / KEY_FILE, key)


def make(directory: Path) -> tuple[str, bool]:
    """Create the root in the CA's folder unless it exists. Return its public key, and whether it is new.

    Raises ``OSError``, and ``ValueError`` if the key is missing although it was created once: the other sites would
    have to trust a new one.
    """
    key, shown = directory / KEY_FILE, directory / PUBLIC_FILE
    if key.exists():
        return _public(key, key.read_bytes()), False
    if shown.exists():
        parse_public(known := shown.read_text().strip())
        raise ValueError(
            f"{key.name} is missing: put it there temporarily; or remove {shown.name} to create a new root, and let"
            f" every site that trusts {known} trust that one instead"
        )
    private, public_key = new_root()
    # O_EXCL: never replace a root.
    descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
        file.flush()
        os.fsync(file.fileno())
    files.replace(shown, public_key.encode() + b"\n", 0o644, sync=True)
    return public_key, True


def install(directory: Path, tls_dir: Path) -> None:
    """Copy the root's key from the CA's folder to the bridge's, with mode 0600. Raises ``OSError``."""
    files.replace(tls_dir / KEY_FILE, (directory / KEY_FILE).read_bytes(), 0o600)


def _public(path: Path, key: bytes) -> str:
    try:
        return public_root(key)
    except PartyError as error:
        raise PartyError(f"{path}: {error}; restore the key, which `isthmus-bridge certs` created") from None
