from dataclasses import replace

import pytest

from isthmus.secure_aggregation.primitives.keys import (
    KeyAgreementError,
    RoundKeys,
    Scope,
    agree,
    derive,
    hkdf,
    public_key,
)

_SCOPE = Scope("job-1", 3, 17)


def test_x25519_agrees_with_rfc_7748() -> None:
    """Section 6.1."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_key(alice).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_key(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert agree(alice, public_key(bob)) == agree(bob, public_key(alice)) == shared


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "expected"),
    [
        (
            b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)), bytes(range(0x60, 0xB0)), bytes(range(0xB0, 0x100)), 82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c"
            "2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22, None, b"", 42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)  # fmt: skip
def test_hkdf_agrees_with_rfc_5869(secret, salt, info, length, expected) -> None:
    """Appendix A.1 to A.3."""
    assert hkdf(secret, info, salt, length).hex() == expected


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), (1).to_bytes(32, "little")])
def test_public_keys_that_would_give_the_secret_away_are_refused(public: bytes) -> None:
    with pytest.raises(KeyAgreementError):
        RoundKeys.generate().agree_mask(public)


def test_two_clients_agree_and_their_two_key_pairs_differ() -> None:
    ours, theirs = RoundKeys.generate(), RoundKeys.generate()
    assert ours.agree_mask(theirs.mask_public) == theirs.agree_mask(ours.mask_public)
    assert ours.agree_share(theirs.share_public) == theirs.agree_share(ours.share_public)
    assert ours.agree_mask(theirs.mask_public) != ours.agree_share(theirs.share_public)
    assert public_key(ours.mask_secret_bytes) == ours.mask_public


def test_a_derived_key_depends_on_everything() -> None:
    secret = bytes(range(32))
    keys = [
        derive(secret, _SCOPE, "mask", 1, 2),
        derive(secret[::-1], _SCOPE, "mask", 1, 2),
        derive(secret, replace(_SCOPE, job_uid="job-2"), "mask", 1, 2),
        derive(secret, replace(_SCOPE, round=4), "mask", 1, 2),
        derive(secret, replace(_SCOPE, incarnation=18), "mask", 1, 2),
        derive(secret, _SCOPE, "share", 1, 2),
        derive(secret, _SCOPE, "mask", 2, 1),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}
    assert derive(secret, _SCOPE, "mask", 1, 2) == keys[0]
