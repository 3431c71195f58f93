"""Parties of secure aggregation: roots that sign clients' keys, and the roots that a client trusts. Ed25519 (RFC 8032).

A *party* is one administration: a site, or the cloud pools of one cluster. It has a *root* key, which signs a
*credential* for each of its pools and jobs: the public half of the key with which the pool's clients sign in a round.
A client checks the credentials of all others against the roots in its trust file, which comes from its own party.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..identities import CREDENTIAL_FILE, SIGNING_KEY_FILE, TRUST_FILE
from ..process.files import replace
from ..secure_sums import FEWEST_CLIENTS

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64

# Encodings of the lengths of most fields.
_LENGTHS = [length.to_bytes(8, "big") for length in range(256)]
_CREDENTIAL_DOMAIN = "isthmus.dev/credential/v1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}")
_HEX_KEY = re.compile(r"[0-9a-f]{64}")
# Encodings of the points of small order, without the sign bit: anybody can sign for a key of these. They include all
# zeros, which somebody may write as a placeholder.
_SMALL_ORDER = frozenset(
    int.from_bytes(bytes.fromhex(text), "little")
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)
_SIGN_BIT = 1 << 255


class PartyError(ValueError):
    """A key, credential, signature or trust file that is malformed or not genuine. The message is one line."""


def canonical(domain: str, *fields: bytes | str | int) -> bytes:
    """Return the text that is signed or hashed for ``fields``: no two different lists of fields give the same bytes.

    ``domain`` names the purpose and fixes the fields' number and types. Each field follows its length (8 bytes, big
    endian); an integer from 0 to 2**64 - 1 is 8 bytes, big endian. Raises ``OverflowError`` for other integers.
    """
    parts = []
    # A roster of a thousand clients has twenty thousand fields: no comprehensions with calls for each.
    for field in (domain, *fields):
        raw = (
            field.encode()
            if isinstance(field, str)
            else field
            if isinstance(field, bytes)
            else field.to_bytes(8, "big")
        )
        parts.append(_LENGTHS[len(raw)] if len(raw) < len(_LENGTHS) else len(raw).to_bytes(8, "big"))
        parts.append(raw)
    return b"".join(parts)


@dataclass(frozen=True)
class Credential:
    """The statement of a party's root that a key belongs to one of its pools in one job."""

    party: str
    job_uid: str
    pool: str
    public_key: bytes
    """Ed25519, 32 bytes: verifies the signatures of the pool's clients."""
    signature: bytes
    """Signature of the party's root over the fields above, 64 bytes."""

    def __post_init__(self) -> None:
        for name in ("party", "job_uid", "pool"):
            if _NAME.fullmatch(getattr(self, name)) is None:
                raise PartyError(f"credential: {name} {getattr(self, name)[:64]!r} is not a name")
        _load_public(self.public_key, "credential: public_key")
        if len(self.signature) != SIGNATURE_BYTES:
            raise PartyError(f"credential: signature has {len(self.signature)} bytes, not {SIGNATURE_BYTES}")

    @property
    def signed(self) -> bytes:
        """Text that the root signs."""
        return canonical(_CREDENTIAL_DOMAIN, self.party, self.job_uid, self.pool, self.public_key)

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """Read a credential file: a JSON object with the fields, bytes in hexadecimal digits. Raises ``PartyError``."""
        values = _json_object(text, "credential")
        names = ("party", "job_uid", "pool", "public_key", "signature")
        for name in values:
            if name not in names:
                raise PartyError(f"credential: unknown field {name[:64]!r}")
        for name in names:
            if not isinstance(values.get(name), str):
                raise PartyError(f"credential: {name} is missing or not a text")
        return cls(
            values["party"],
            values["job_uid"],
            values["pool"],
            _from_hex(values["public_key"], "credential: public_key"),
            _from_hex(values["signature"], "credential: signature"),
        )

    def serialized(self) -> bytes:
        """Return the content of a credential file, which :meth:`parse` reads."""
        values = {"party": self.party, "job_uid": self.job_uid, "pool": self.pool}
        values |= {"public_key": self.public_key.hex(), "signature": self.signature.hex()}
        return json.dumps(values, indent=1).encode() + b"\n"


def new_root() -> tuple[bytes, str]:
    """Create a party's root. Return its private key (PEM, PKCS #8) and its public key (64 hexadecimal digits)."""
    key = Ed25519PrivateKey.generate()
    return _pem(key), key.public_key().public_bytes_raw().hex()


def public_root(root_key: bytes) -> str:
    """Return the public key (64 hexadecimal digits) of a root's private key (PEM). Raises ``PartyError``."""
    return _load_private(root_key, "root key").public_key().public_bytes_raw().hex()


def issue(root_key: bytes, party: str, job_uid: str, pool: str) -> tuple[bytes, Credential]:
    """Create a signing key for the clients of a pool. Return it (PEM) and its credential, signed by ``root_key`` (PEM).

    Raises ``PartyError``.
    """
    root = _load_private(root_key, "root key")
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    unsigned = Credential(party, job_uid, pool, public, bytes(SIGNATURE_BYTES))
    return _pem(key), Credential(party, job_uid, pool, public, root.sign(unsigned.signed))


def verify(credential: Credential, root_public: str) -> None:
    """Check that the root with this public key (64 hexadecimal digits) signed the credential. Raises ``PartyError``."""
    verify_signature(parse_public(root_public), credential.signed, credential.signature, "credential")


def verify_signature(public_key: bytes, text: bytes, signature: bytes, what: str = "message") -> None:
    """Check an Ed25519 signature over ``text`` (see :func:`canonical`). Raises ``PartyError``, which names ``what``."""
    try:
        _load_public(public_key, f"{what}: public key").verify(signature, text)
    except InvalidSignature:
        raise PartyError(f"{what}: the signature is wrong") from None


def parse_public(text: str) -> bytes:
    """Return the 32 bytes of a public key in hexadecimal digits. Raises ``PartyError``."""
    if _HEX_KEY.fullmatch(text) is None:
        raise PartyError(f"{text[:80]!r} is not a public key: 64 hexadecimal digits in lower case")
    key = bytes.fromhex(text)
    _load_public(key, text)
    return key


class Signer:
    """The signing key of a pool's clients, with its credential."""

    def __init__(self, key: bytes, credential: Credential) -> None:
        """``key``: in PEM. Raises ``PartyError`` if the credential is for another key."""
        self._key = _load_private(key, SIGNING_KEY_FILE)
        if self._key.public_key().public_bytes_raw() != credential.public_key:
            raise PartyError(f"{SIGNING_KEY_FILE} and {CREDENTIAL_FILE} do not belong together: use files of one pool")
        self.credential = credential

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the key and its credential from a client's TLS directory. Raises ``PartyError`` and ``OSError``."""
        credential = Credential.parse((directory / CREDENTIAL_FILE).read_bytes())
        return cls((directory / SIGNING_KEY_FILE).read_bytes(), credential)

    def sign(self, text: bytes) -> bytes:
        """Return the signature (64 bytes) over ``text``, which comes from :func:`canonical` with its own domain."""
        return self._key.sign(text)


def _checked_root(text: str) -> str:
    parse_public(text)
    return text


def distinct_roots(roots: dict[str, str]) -> dict[str, str]:
    """Return the public roots by party. Raises ``ValueError`` if two parties have the same one."""
    owners: dict[str, str] = {}
    for party, root in roots.items():
        if root in owners:
            raise ValueError(f"{owners[root]} and {party} have the same root: one party cannot count as two")
        owners[root] = party
    return roots


PartyName = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
PublicRoot = Annotated[str, AfterValidator(_checked_root)]


class Trust(BaseModel):
    """The conditions under which a client takes part in secure aggregation, from its own party. Unknown fields fail."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    roots: Annotated[dict[PartyName, PublicRoot], AfterValidator(distinct_roots)]
    """Public key of each trusted party's root: 64 hexadecimal digits."""
    min_parties: Annotated[int, Field(ge=1, le=1000)] = 1
    """Least number of distinct parties in a round."""
    min_clients: Annotated[int, Field(ge=FEWEST_CLIENTS, le=1_000_000)] = FEWEST_CLIENTS
    """Least number of clients in a round."""
    required: bool = False
    """Refuse rounds without secure aggregation."""
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Refuse rounds in which the clients add less noise than this to their updates, in clipping norms. With 0: those in
    which they add none."""
    tensors: list[Annotated[str, Field(min_length=1, max_length=512)]] = ["*"]
    """Shell patterns of the names of tensors that may leave the client."""
    max_bytes_per_round: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Most bytes that a client may send in one round."""

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """Read a trust file: a JSON object. Raises ``PartyError``."""
        values = _json_object(text, "trust")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(("trust", *map(str, first["loc"])))
            raise PartyError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the trust file of a client's TLS directory. Raises ``PartyError`` and ``OSError``."""
        return cls.parse((directory / TRUST_FILE).read_bytes())

    def serialized(self) -> bytes:
        """Return the content of a trust file, which :meth:`parse` reads."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    def verify(self, credential: Credential, job_uid: str) -> None:
        """Check that a trusted party's root signed the credential for this job. Raises ``PartyError``."""
        root = self.roots.get(credential.party)
        if root is None:
            raise PartyError(f"credential: party {credential.party!r} has no root in {TRUST_FILE} of this site")
        if credential.job_uid != job_uid:
            raise PartyError(f"credential: of pool {credential.pool!r} is for job {credential.job_uid}, not {job_uid}")
        verify(credential, root)


def party_files(signing_key: bytes, credential: Credential, trust: Trust) -> dict[str, bytes]:
    """Return the files for a client's TLS directory by name."""
    return {
        SIGNING_KEY_FILE: signing_key,
        CREDENTIAL_FILE: credential.serialized(),
        TRUST_FILE: trust.serialized(),
    }


def write_party_files(directory: Path, signing_key: bytes, credential: Credential, trust: Trust) -> None:
    """Write the files of :func:`party_files` with mode 0600 into an existing directory. Raises ``OSError``."""
    for name, content in party_files(signing_key, credential, trust).items():
        replace(directory / name, content, 0o600)


def _json_object(text: bytes | str, what: str) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            # Otherwise the last one would win, and readers could disagree about the content.
            if name in found:
                raise PartyError(f"{what}: {name[:64]!r} occurs twice")
            found[name] = value
        return found

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except PartyError:
        raise
    except (ValueError, RecursionError):
        raise PartyError(f"{what}: not JSON") from None
    if not isinstance(values, dict):
        raise PartyError(f"{what}: not a JSON object")
    return values


def _from_hex(text: str, what: str) -> bytes:
    if re.fullmatch(r"(?:[0-9a-f]{2})*", text) is None:
        raise PartyError(f"{what}: not hexadecimal digits in lower case")
    return bytes.fromhex(text)


def _load_public(key: bytes, what: str) -> Ed25519PublicKey:
    if len(key) != PUBLIC_KEY_BYTES:
        raise PartyError(f"{what}: has {len(key)} bytes, not {PUBLIC_KEY_BYTES}")
    if int.from_bytes(key, "little") & ~_SIGN_BIT in _SMALL_ORDER:
        raise PartyError(f"{what}: is not a usable key: anybody could sign for it")
    return Ed25519PublicKey.from_public_bytes(key)


def _load_private(pem: bytes, what: str) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise PartyError(f"{what}: not a private key in PEM without a password") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise PartyError(f"{what}: not an Ed25519 key")
    return key


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
