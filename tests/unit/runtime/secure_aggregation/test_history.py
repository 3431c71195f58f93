"""Bounds of the next round that follow from opened sums."""

from isthmus.secure_aggregation.encoding.history import FIRST_CLIP, LEAST_SHARE, History

FIRSTS = {"w": FIRST_CLIP, "b": FIRST_CLIP}


def after(history: History, largest: float, clipped: float = 0.0, weight: float = 500.0, capped: float = 0) -> History:
    return history.after(32, {"w": largest, "b": 0.0}, FIRSTS, clipped, weight, capped)


def test_clips_follow_the_last_global_change_with_a_margin() -> None:
    history = after(History(), 0.01)
    assert history.clips["w"] == 64 * 0.01
    assert after(history, 1.0).clips["w"] == 64.0


def test_a_clip_falls_slowly_and_not_below_a_floor() -> None:
    history = History()
    clips = []
    for _ in range(6):
        history = after(history, 0.0)
        clips.append(history.clips["b"])
    assert clips[:2] == [FIRST_CLIP / 8, FIRST_CLIP / 64]
    assert clips[-1] == FIRST_CLIP * LEAST_SHARE


def test_clipping_widens_the_margin_until_it_stops() -> None:
    history = after(History(), 0.01, clipped=0.1)
    assert history.margin == 128
    history = after(history, 0.01, clipped=0.1)
    assert history.clips["w"] == 256 * 0.01
    for _ in range(20):
        history = after(history, 0.01, clipped=0.1)
    assert history.margin == 4096
    for _ in range(20):
        history = after(history, 0.01)
    assert history.margin == 64


def test_the_largest_weight_is_a_power_of_two_that_no_client_exceeded() -> None:
    assert after(History(), 0.01, weight=500).weight == 512
    assert after(History(), 0.01, weight=512).weight == 512
    assert after(History(), 0.01, weight=1.0).weight == 1
    assert after(History(weight=1024), 0.01, weight=513, capped=1).weight == 4096


def test_a_history_survives_a_checkpoint() -> None:
    history = after(after(History(), 0.01), 0.3, clipped=1.0)
    assert History.of_state(history.state()) == history
    assert History.of_state({}) == History()
    assert History().state() == {}
    nothing = History().after(32, {}, {}, 0.0, 10.0, 0)
    assert History.of_state(nothing.state()) == nothing
