"""Checks of clients' messages. All raise ``Refusal`` and have no effect."""

from collections.abc import Callable, Collection, Mapping

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import Credential, PartyError

from ..parameters import (
    MOST_BYTES,
    NUMBER_BYTES,
    SEALED_MESSAGE_BYTES,
    SHARE_MESSAGE_BYTES,
    SIGNATURE_BYTES,
    Participant,
)
from ..primitives.keys import KeyAgreementError, RoundKeys
from ..primitives.shamir import SHARE_BYTES
from ..primitives.shares import SEALED_BYTES
from ..refusal import Reason, Refusal
from ..roster import check_form, check_signature, credential_of
from ..transcript import Terms

# Keys that only tell whether others' keys are usable.
_PROBE = RoundKeys.generate()

CheckCredential = Callable[[Credential], None]
"""Raises ``PartyError`` for a credential that the job does not accept."""


def check_size(message: pb.SecureClientMessage, neighbours: int, clients: int) -> None:
    """Check that a message is not larger than any valid one of its step."""
    most = {
        "shares": neighbours * SEALED_MESSAGE_BYTES,
        "unmask": (neighbours + 1) * SHARE_MESSAGE_BYTES,
        "refusal": clients * NUMBER_BYTES,
        "complaint": clients * NUMBER_BYTES,
    }
    limit = MOST_BYTES + most.get(message.WhichOneof("step") or "", 0)
    if message.ByteSize() > limit:
        raise Refusal(Reason.SIZE, f"a message of {message.ByteSize()} bytes; at most {limit} are needed")


def check_entry(
    entry: pb.SecureEntry, terms: Terms, participant: Participant, taken: Collection[bytes],
    check_credential: CheckCredential | None,
) -> None:  # fmt: skip
    """Check a client's entry. ``taken``: keys of other clients."""
    told = Participant(entry.pool, entry.index, entry.attempt, entry.instance)
    if told != participant:
        raise Refusal(Reason.ENTRY, "the entry names another client, attempt or process than its sender")
    check_form(entry, entry.index)
    if entry.mask_key == entry.share_key or entry.mask_key in taken or entry.share_key in taken:
        raise Refusal(Reason.DUPLICATE, "a key of the entry is in use")
    for key in (entry.mask_key, entry.share_key):
        try:
            _PROBE.agree_mask(key)
        except KeyAgreementError as error:
            raise Refusal(Reason.KEY, str(error)) from error
    try:
        credential = credential_of(entry)
        if credential.job_uid != terms.job_uid:
            raise PartyError(f"the credential is for job {credential.job_uid}, not {terms.job_uid}")
        if check_credential is not None:
            check_credential(credential)
    except PartyError as error:
        raise Refusal(Reason.CREDENTIAL, str(error)) from error
    check_signature(terms, entry, entry.index)


def check_shares(message: pb.SecureShares, neighbours: Collection[int]) -> None:
    """Check that there is one ciphertext for each neighbour."""
    if [sealed.peer for sealed in message.sealed] != sorted(neighbours):
        raise Refusal(Reason.SHARES, "the sealed shares are not one for each neighbour, in ascending order")
    if any(len(sealed.ciphertext) != SEALED_BYTES for sealed in message.sealed):
        raise Refusal(Reason.SHARES, f"sealed shares do not have {SEALED_BYTES} bytes")


def check_consent(message: pb.SecureConsent, verify: Callable[[bytes], None]) -> None:
    """Check a signature by ``verify``, which raises ``PartyError``."""
    try:
        if len(message.signature) != SIGNATURE_BYTES:
            raise PartyError(f"the signature does not have {SIGNATURE_BYTES} bytes")
        verify(message.signature)
    except PartyError as error:
        raise Refusal(Reason.SIGNATURE, f"the consent to the survivors: {error}") from error


def check_unmask(message: pb.SecureUnmask, expected: Mapping[int, bool]) -> None:
    """Check that there is one share for each expected entry: of the self mask's seed where the value is True."""
    if [share.entry for share in message.shares] != sorted(expected):
        raise Refusal(Reason.SHARES, "the shares are not one for each client that the sender shares secrets with")
    for share in message.shares:
        right, other = share.self_seed_share, share.mask_key_share
        if not expected[share.entry]:
            right, other = other, right
        if other or len(right) != SHARE_BYTES:
            raise Refusal(Reason.SHARES, f"the share for entry {share.entry} is of the wrong kind or length")
