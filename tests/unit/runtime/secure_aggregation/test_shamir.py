import itertools
import secrets
import time

import pytest
import shamirs
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.secure_aggregation.primitives.shamir import (
    PRIME,
    SECRET_BYTES,
    SHARE_BYTES,
    ShamirError,
    combine,
    decode,
    fits,
    interpolate,
    split,
    split_number,
    value_at_zero,
)

_SMALL = 7919
_sharings = st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def _secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def _wrong(share: bytes) -> bytes:
    return bytes([share[0], *share[1:-1], share[-1] ^ 1])


@given(st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES), _sharings, st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_threshold_of_shares_recover_the_secret(secret, sharing, random) -> None:
    n, threshold = sharing
    shares = split(secret, threshold, range(1, n + 1))
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    some = random.sample(sorted(shares), threshold)
    assert combine({x: shares[x] for x in some}, threshold, secret.__eq__) == (secret, frozenset())


@given(st.data(), _sharings)
@settings(max_examples=60, deadline=None)
def test_wrong_shares_are_found_up_to_half_of_the_redundancy(data, sharing) -> None:
    n, threshold = sharing
    secret = _secret()
    shares = split(secret, threshold, range(1, n + 1))
    wrong = data.draw(st.sets(st.sampled_from(sorted(shares)), max_size=(n - threshold) // 2))
    for x in wrong:
        shares[x] = secrets.randbelow(PRIME).to_bytes(SHARE_BYTES, "big")
    assert combine(shares, threshold, secret.__eq__) == (secret, frozenset(wrong))


def test_wrong_shares_are_found_beyond_half_of_the_redundancy() -> None:
    secret = _secret()
    shares = split(secret, 3, range(1, 8))
    wrong = {1, 2, 4, 7}
    for x in wrong:
        shares[x] = secrets.randbelow(PRIME).to_bytes(SHARE_BYTES, "big")
    assert combine(shares, 3, secret.__eq__) == (secret, frozenset(wrong))


@pytest.mark.parametrize(
    "share", [b"", bytes(SHARE_BYTES - 1), b"\xff" * SHARE_BYTES, PRIME.to_bytes(SHARE_BYTES, "big")]
)
def test_a_malformed_share_is_named(share: bytes) -> None:
    secret = _secret()
    shares = split(secret, 3, [5, 6, 7, 9]) | {6: share}
    assert combine(shares, 3, secret.__eq__) == (secret, frozenset({6}))


def test_too_many_wrong_shares_end_in_an_error_after_bounded_time() -> None:
    secret = _secret()
    shares = split(secret, 28, range(1, 42))
    for x in range(1, 15):
        shares[x] = _wrong(shares[x])
    before = time.monotonic()
    with pytest.raises(ShamirError, match="41 shares with a threshold of 28: too many of them are wrong"):
        combine(shares, 28, secret.__eq__)
    assert time.monotonic() - before < 60


def test_fewer_shares_than_the_threshold_are_refused() -> None:
    secret = _secret()
    shares = split(secret, 3, [1, 2, 3])
    with pytest.raises(ShamirError, match="2 valid shares of 2, 3 are needed"):
        combine({x: shares[x] for x in (1, 3)}, 3, secret.__eq__)


@pytest.mark.parametrize(
    "arguments",
    [(bytes(31), 1, [1]), (bytes(32), 0, [1]), (bytes(32), 3, [1, 2]), (bytes(32), 1, [0]), (bytes(32), 1, [1, 1])],
)
def test_impossible_sharings_are_refused(arguments) -> None:
    with pytest.raises(ShamirError):
        split(*arguments)


@pytest.mark.parametrize("prime", [PRIME, 2**127 - 1, _SMALL])
@given(st.data(), st.integers(2, 24), st.randoms())
@settings(max_examples=30, deadline=None)
def test_an_independent_implementation_agrees(prime, data, n, random) -> None:
    threshold = data.draw(st.integers(1, n))
    secret = data.draw(st.integers(0, prime - 1))
    ours = split_number(secret, threshold, range(1, n + 1), prime)
    some = random.sample([shamirs.share(x, y, prime) for x, y in ours.items()], threshold)
    assert shamirs.interpolate(some, threshold=threshold) == secret
    theirs = shamirs.shares(secret, quantity=n, modulus=prime, threshold=threshold)
    points = {share.index: share.value for share in theirs}
    for polynomial in (interpolate(points, prime), decode(points, threshold, prime)):
        assert (polynomial or [0])[0] == secret


@pytest.mark.parametrize("prime", [PRIME, 2**127 - 1])
@given(st.data(), _sharings)
@settings(max_examples=30, deadline=None)
def test_one_wrong_share_is_noticed(prime, data, sharing) -> None:
    n, threshold = sharing
    points = split_number(secret := secrets.randbelow(prime), threshold, range(1, n + 1), prime)
    assert fits(points, threshold, prime)
    assert value_at_zero(points, prime) == secret
    x = data.draw(st.sampled_from(sorted(points)))
    changed = points | {x: (points[x] + data.draw(st.integers(1, prime - 1))) % prime}
    assert fits(changed, threshold, prime) == (n == threshold)
    assert value_at_zero(changed, prime) != secret


def test_shares_below_the_threshold_say_nothing() -> None:
    """For each value of the secret, exactly one value of a missing share fits, so all values are equally likely."""
    prime = 31
    known = {1: 17, 2: 4}
    fitting = {
        secret: [y for y in range(prime) if ([*interpolate(known | {3: y}, prime), 0])[0] == secret]
        for secret in range(prime)
    }
    assert {len(ys) for ys in fitting.values()} == {1}
    assert sorted(itertools.chain.from_iterable(fitting.values())) == list(range(prime))


def test_coefficients_are_fresh() -> None:
    secret = _secret()
    assert len({share for _ in range(10) for share in split(secret, 2, [1, 2]).values()}) == 20
