import os
from dataclasses import replace

import pytest

from isthmus.secure_aggregation.primitives.keys import Scope
from isthmus.secure_aggregation.primitives.shamir import SHARE_BYTES
from isthmus.secure_aggregation.primitives.shares import SEALED_BYTES, SharePair, SharesError, open_sealed, seal

_SECRET = bytes(range(32))
_SCOPE = Scope("job-1", 3, 17)
_DIGEST = bytes(32)


@pytest.fixture
def shares() -> SharePair:
    return SharePair(os.urandom(SHARE_BYTES), os.urandom(SHARE_BYTES))


def test_the_receiver_opens_what_the_sender_sealed(shares: SharePair) -> None:
    sealed = seal(_SECRET, _SCOPE, 4, 7, _DIGEST, shares)
    assert len(sealed) == SEALED_BYTES
    assert open_sealed(_SECRET, _SCOPE, 4, 7, _DIGEST, sealed) == shares


@pytest.mark.parametrize(
    "context",
    [
        (bytes(32), _SCOPE, 4, 7, _DIGEST),
        (_SECRET, replace(_SCOPE, job_uid="job-2"), 4, 7, _DIGEST),
        (_SECRET, replace(_SCOPE, round=4), 4, 7, _DIGEST),
        (_SECRET, replace(_SCOPE, incarnation=18), 4, 7, _DIGEST),
        (_SECRET, _SCOPE, 7, 4, _DIGEST),
        (_SECRET, _SCOPE, 4, 8, _DIGEST),
        (_SECRET, _SCOPE, 4, 7, b"\x01" * 32),
    ],
)
def test_shares_are_bound_to_their_context(context, shares: SharePair) -> None:
    sealed = seal(_SECRET, _SCOPE, 4, 7, _DIGEST, shares)
    with pytest.raises(SharesError, match="altered"):
        open_sealed(*context, sealed)


@pytest.mark.parametrize("at", [0, 11, 12, 80, SEALED_BYTES - 1])
def test_altered_shares_are_refused(at: int, shares: SharePair) -> None:
    sealed = bytearray(seal(_SECRET, _SCOPE, 4, 7, _DIGEST, shares))
    sealed[at] ^= 1
    with pytest.raises(SharesError, match="altered"):
        open_sealed(_SECRET, _SCOPE, 4, 7, _DIGEST, bytes(sealed))


@pytest.mark.parametrize("sealed", [b"", bytes(SEALED_BYTES - 1), bytes(SEALED_BYTES + 1)])
def test_shares_of_another_length_are_refused(sealed: bytes) -> None:
    with pytest.raises(SharesError, match="bytes instead of"):
        open_sealed(_SECRET, _SCOPE, 4, 7, _DIGEST, sealed)


def test_shares_of_another_length_are_not_sealed() -> None:
    with pytest.raises(SharesError, match=f"a share does not have {SHARE_BYTES} bytes"):
        seal(_SECRET, _SCOPE, 4, 7, _DIGEST, SharePair(bytes(SHARE_BYTES - 1), bytes(SHARE_BYTES + 1)))


def test_sealing_twice_gives_unrelated_bytes(shares: SharePair) -> None:
    first, second = (seal(_SECRET, _SCOPE, 4, 7, _DIGEST, shares) for _ in range(2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < SEALED_BYTES / 4
