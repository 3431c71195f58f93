"""Certificates: a small CA per job (or site), and the leaf certificates that it signs. ECDSA P-256, TLS 1.2+."""

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..identities import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from ..process.files import replace

# Clocks of nodes and sites differ, some by hours (a local time read as UTC): certificates are valid from one day before
# their creation. This is safe, since their keys did not exist before.
CLOCK_SKEW = dt.timedelta(days=1)


@dataclass(frozen=True)
class Credentials:
    """Credentials of one end of a connection, in PEM."""

    ca: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read ca.crt, tls.crt and tls.key. Raises ``OSError``."""
        return cls(*((directory / name).read_bytes() for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE)))

    def write(self, directory: Path) -> None:
        """Write the three files with mode 0600 into the directory, created with mode 0700 if it is missing.

        Each file is replaced atomically, since a running server may read them. Raises ``OSError``.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in self.files().items():
            replace(directory / name, content, 0o600)

    def files(self) -> dict[str, bytes]:
        """Return the three files by name, which are also the data of a kubernetes.io/tls Secret."""
        return {CA_FILE: self.ca, CERTIFICATE_FILE: self.certificate, KEY_FILE: self.key}


class Authority:
    """A certificate authority."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, name: str, lifetime: dt.timedelta, now: dt.datetime | None = None) -> Self:
        """Create a self-signed authority. ``now``, here and below, replaces the clock's time."""
        return cls._signed(_name(name), ec.generate_private_key(ec.SECP256R1()), lifetime, now)

    def renewed(self, lifetime: dt.timedelta, now: dt.datetime | None = None) -> Self:
        """Return the authority with the same name and key and a later end of validity.

        Both certificates verify everything that the key has signed, so holders of the old and the new one trust each
        other."""
        return self._signed(self._certificate.subject, self._key, lifetime, now)

    @classmethod
    def _signed(
        cls, subject: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: dt.timedelta, now: dt.datetime | None
    ) -> Self:
        builder = _builder(subject, subject, key, lifetime, now)
        builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
        builder = builder.add_extension(
            x509.KeyUsage(False, False, False, False, False, key_cert_sign=True, crl_sign=True, encipher_only=False,
                          decipher_only=False),
            critical=True,
        )  # fmt: skip
        # Identifies the signer for peers that trust two authorities of one name during a replacement.
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> Self:
        """Read an authority from PEM. Raises ``ValueError``."""
        private = serialization.load_pem_private_key(key, None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError("the CA's key is not an elliptic-curve key")
        return cls(x509.load_pem_x509_certificate(certificate), private)

    @property
    def certificate(self) -> bytes:
        """CA certificate in PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key(self) -> bytes:
        """Private key of the CA in PEM."""
        return _pem(self._key)

    @property
    def key_id(self) -> str:
        """Identifier of the CA's key; a renewed authority keeps it."""
        public = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(public).hexdigest()[:16]

    @property
    def expires(self) -> dt.datetime:
        """End of the CA's validity (UTC)."""
        return self._certificate.not_valid_after_utc

    def issue(
        self,
        name: str,
        lifetime: dt.timedelta,
        *,
        hosts: Sequence[str] = (),
        uris: Sequence[str] = (),
        now: dt.datetime | None = None,
    ) -> Credentials:
        """Create and sign a key for a server (``hosts``: names or addresses) or a client (``uris``: its identities)."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * bool(hosts) + [ExtendedKeyUsageOID.CLIENT_AUTH] * bool(uris)
        alternatives: list[x509.GeneralName] = [_host(host) for host in hosts]
        alternatives += [x509.UniformResourceIdentifier(uri) for uri in uris]
        certificate = (
            _builder(_name(name), self._certificate.subject, key, lifetime, now)
            .add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Credentials(self.certificate, certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def certificates_in(bundle: bytes) -> list[bytes]:
    """Return the certificates of a PEM file with one or more. Raises ``ValueError``."""
    return [found.public_bytes(serialization.Encoding.PEM) for found in x509.load_pem_x509_certificates(bundle)]


def expiry(certificate: bytes) -> dt.datetime:
    """Return the end of a PEM certificate's validity (UTC). Raises ``ValueError``."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _name(name: str) -> x509.Name:
    # An X.509 common name holds at most 64 characters; identities are in the alternative names.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    lifetime: dt.timedelta,
    now: dt.datetime | None,
) -> x509.CertificateBuilder:
    now = now or dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
