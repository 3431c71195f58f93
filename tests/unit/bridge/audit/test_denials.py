"""Denials cannot fill the audit log."""

from isthmus_bridge.audit.denials import DenialLimit


def test_the_same_denial_is_recorded_once_an_hour() -> None:
    limit = DenialLimit()
    assert limit.admit("a", 0) == 0
    assert [limit.admit("a", second) for second in range(1, 3600, 600)] == [None] * 6
    assert limit.admit("b", 3000) == 6
    assert limit.admit("a", 3601) == 0


def test_a_flood_of_different_denials_is_cut_and_counted() -> None:
    limit = DenialLimit()
    recorded = [limit.admit(number, number / 100) for number in range(10_000)]
    assert 100 <= sum(omitted is not None for omitted in recorded) <= 120
    assert limit.admit("later", 10_000) is not None
    admitted = [omitted for omitted in recorded if omitted is not None]
    assert sum(admitted) + len(admitted) <= 10_000


def test_memory_stays_bounded() -> None:
    limit = DenialLimit()
    for number in range(3000):
        assert limit.admit(number, number * 60.0) is not None
    assert limit.admit(0, 3000 * 60.0) is not None
