"""Shares on their way from one client to another, which the aggregator forwards and cannot read."""

import os
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .keys import Scope, derive
from .shamir import SHARE_BYTES

_DOMAIN = b"isthmus secure aggregation v1 share"
_NONCE_BYTES = 12
_TAG_BYTES = 16
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES


class SharesError(ValueError):
    """Sealed shares cannot be opened. ``str()`` gives the reason."""


@dataclass(frozen=True)
class SharePair:
    """One holder's shares of a client's two secrets; the aggregator gets at most one of the two."""

    self_seed: bytes
    mask_key: bytes


def seal(secret: bytes, scope: Scope, sender: int, receiver: int, roster_digest: bytes, shares: SharePair) -> bytes:
    """Encrypt the sender's shares for the receiver with ChaCha20-Poly1305 (RFC 8439).

    ``secret`` is what the two agreed on with their share keys; ``sender`` and ``receiver`` are entries of the roster.
    Returns ``SEALED_BYTES`` bytes.
    """
    plain = shares.self_seed + shares.mask_key
    if len(shares.self_seed) != SHARE_BYTES or len(plain) != 2 * SHARE_BYTES:
        raise SharesError(f"a share does not have {SHARE_BYTES} bytes")
    # The key serves one message. The random nonce keeps a second one, which would be a defect, from revealing both.
    nonce = os.urandom(_NONCE_BYTES)
    key = derive(secret, scope, "share", sender, receiver)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, _context(scope, sender, receiver, roster_digest))


def open_sealed(
    secret: bytes, scope: Scope, sender: int, receiver: int, roster_digest: bytes, sealed: bytes
) -> SharePair:
    """Decrypt shares. Raises ``SharesError`` if they were altered, or sealed for other entries or another instance."""
    if len(sealed) != SEALED_BYTES:
        raise SharesError(f"sealed shares of {len(sealed)} bytes instead of {SEALED_BYTES}")
    key = derive(secret, scope, "share", sender, receiver)
    nonce, ciphertext = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        plain = ChaCha20Poly1305(key).decrypt(nonce, ciphertext, _context(scope, sender, receiver, roster_digest))
    except InvalidTag as error:
        raise SharesError("sealed shares were altered, or are of another instance, sender or receiver") from error
    return SharePair(plain[:SHARE_BYTES], plain[SHARE_BYTES:])


def _context(scope: Scope, sender: int, receiver: int, roster_digest: bytes) -> bytes:
    return _DOMAIN + scope.encode() + struct.pack(">II", sender, receiver) + roster_digest
