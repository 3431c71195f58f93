"""Names and bounds that client and server of the protocol share."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import PUBLIC_KEY_BYTES, SIGNATURE_BYTES

from .primitives.shamir import SHARE_BYTES
from .primitives.shares import SEALED_BYTES

__all__ = ["PUBLIC_KEY_BYTES", "SIGNATURE_BYTES"]

HASH_BYTES = 32
NONCE_BYTES = 32
SEED_BYTES = 32
# A round whose sum was lost after clients agreed to open it is done again once, with updates trained again.
MOST_ATTEMPTS = 1
# Bytes of a client's message without lists. The longest has five names of up to 253 characters.
MOST_BYTES = 4096
# Upper bounds of the elements of lists in messages, with some bytes for tags and lengths.
SEALED_MESSAGE_BYTES = SEALED_BYTES + 16
SHARE_MESSAGE_BYTES = SHARE_BYTES + 16
NUMBER_BYTES = 5
LONGEST_NAME = 253

ClientId = tuple[str, int]
"""(pool, index within the pool)"""


class Phase(IntEnum):
    """State of an instance at the server. The numbers are kept in journals."""

    ADVERTISE = 1
    REVEAL = 2
    SHARES = 3
    COLLECT = 4
    """Updates come in; no deadline of the protocol."""
    CONSENT = 5
    UNMASK = 6
    DONE = 7
    FAILED = 8


class UpdateKey(NamedTuple):
    """Identity of an update that a client holds."""

    round: int
    base_digest: str
    """Digest of the base model and the settings, as in ``SecureBegin``."""
    attempt: int
    """``Offer.secure_attempt`` for which it was trained."""
    digest: str
    """Identity of its integers before masks were added."""


@dataclass(frozen=True)
class Participant:
    """A client that an instance begins with."""

    pool: str
    index: int
    attempt: int
    instance: str

    @property
    def id(self) -> ClientId:
        return self.pool, self.index


class Outgoing(NamedTuple):
    """A message of the server to one client."""

    who: ClientId
    message: pb.SecureServerMessage


class Fault(NamedTuple):
    """A message of a client that broke the protocol, or its refusal to go on."""

    who: ClientId
    reason: str
    """One word of ``refusal.Reason``, or ``REFUSED``."""
    message: str
    """One line."""


REFUSED = "refused"


def point(entry: int) -> int:
    """Return the point of an entry's shares. At 0 would be the secret itself."""
    return entry + 1
