"""Keys of one instance of the protocol: X25519 key pairs, and the keys derived from what two of them agree on."""

import struct
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
_DOMAIN = b"isthmus secure aggregation v1"


class KeyAgreementError(ValueError):
    """A public key is invalid. ``str()`` gives the reason."""


@dataclass(frozen=True)
class Scope:
    """Identity of an instance: no two instances share one, so no two share a derived key."""

    job_uid: str
    round: int
    incarnation: int

    def encode(self) -> bytes:
        """Return bytes that no other scope has; they tell their own length."""
        job = self.job_uid.encode()
        return struct.pack(">H", len(job)) + job + struct.pack(">QQ", self.round, self.incarnation)


class RoundKeys:
    """A client's key pairs for one instance: one for its pairwise masks, one for the shares that it exchanges."""

    def __init__(self, mask_secret: bytes, share_secret: bytes) -> None:
        """Take raw X25519 private keys of 32 bytes."""
        self._mask = X25519PrivateKey.from_private_bytes(mask_secret)
        self._share = X25519PrivateKey.from_private_bytes(share_secret)
        self.mask_secret_bytes = mask_secret
        self.mask_public = self._mask.public_key().public_bytes_raw()
        self.share_public = self._share.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        """Make new key pairs."""
        return cls(*(X25519PrivateKey.generate().private_bytes_raw() for _ in range(2)))

    def agree_mask(self, peer_mask_public: bytes) -> bytes:
        """Return the secret shared with a peer, from which the pairwise mask's key is derived."""
        return _exchange(self._mask, peer_mask_public)

    def agree_share(self, peer_share_public: bytes) -> bytes:
        """Return the secret shared with a peer, from which the keys that seal shares are derived."""
        return _exchange(self._share, peer_share_public)


def public_key(secret: bytes) -> bytes:
    """Return the raw X25519 public key of a raw private key, both of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes) -> bytes:
    """Return the X25519 shared secret (RFC 7748, section 6.1) of 32 bytes.

    Raises ``KeyAgreementError`` if the public key is malformed or of small order, which would make the secret public.
    """
    return _exchange(X25519PrivateKey.from_private_bytes(secret), public)


def _exchange(secret: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise KeyAgreementError("an X25519 public key is malformed or of small order") from error


def derive(secret: bytes, scope: Scope, purpose: str, first: int, second: int) -> bytes:
    """Derive a key of 32 bytes for one purpose between two entries of an instance's roster.

    The order of the entries counts: give the smaller first where both sides need the same key.
    """
    name = purpose.encode()
    context = _DOMAIN + scope.encode() + struct.pack(">H", len(name)) + name + struct.pack(">II", first, second)
    return hkdf(secret, context)


def self_mask_key(seed: bytes, scope: Scope, entry: int) -> bytes:
    """Return the key of a client's self mask, from its seed."""
    return derive(seed, scope, "self mask", entry, entry)


def pair_mask(secret: bytes, scope: Scope, own: int, peer: int) -> tuple[bytes, int]:
    """Return the key of the mask between two clients, from what their mask keys agree on, and the sign at ``own``.

    The sum of both clients' updates is free of it: one adds what the other subtracts.
    """
    return derive(secret, scope, "mask", min(own, peer), max(own, peer)), 1 if own < peer else -1


def hkdf(secret: bytes, info: bytes, salt: bytes | None = None, length: int = KEY_BYTES) -> bytes:
    """Return HKDF-SHA256 (RFC 5869) of a secret."""
    return HKDF(SHA256(), length, salt, info).derive(secret)
