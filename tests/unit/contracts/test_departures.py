"""Lines of a client's audit file."""

import json
from typing import Any

import pytest

from isthmus_contracts.wire.departures import LONGEST_LINE, Departure

SENT: dict[str, Any] = {
    "time": 1796016000.5, "job": "5e2b-uid", "pool": "lumi", "index": 1, "round": 3, "incarnation": 2**63,
    "what": "update", "size": 1000, "sha256": "ab" * 32, "protection": "secure-aggregation", "decision": "sent",
    "reason": "",
}  # fmt: skip


def test_a_line_is_read_back() -> None:
    departure = Departure(**SENT)
    assert departure.line().endswith(b"}\n")
    assert departure.line().count(b"\n") == 1
    assert Departure.parse(departure.line()) == departure


def test_the_longest_valid_line_is_within_the_limit() -> None:
    most = dict.fromkeys(("index", "round", "size"), 2**63 - 1)
    words = {"what": "u" * 64, "protection": "p" * 64, "decision": "refused", "reason": "\u4e2d" * 400}
    longest = Departure(**(SENT | most | words | {"time": -1.7e308, "job": "j" * 253, "pool": "p" * 253}))
    assert len(longest.line()) <= LONGEST_LINE
    assert Departure.parse(longest.line()) == longest


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1}, {"round": -1}, {"round": "1"}, {"round": True}, {"size": 2**63}, {"incarnation": 2**64},
        {"sha256": "AB" * 32}, {"sha256": "ab"}, {"sha256": "ab" * 32 + "\n"}, {"decision": "perhaps"},
        {"protection": "\x1b[31m"}, {"what": "Update"}, {"what": "update\n"}, {"job": "a\nb"}, {"job": ""},
        {"reason": "\x1b]0;title\x07"}, {"reason": "x" * 401}, {"time": float("nan")}, {"time": float("inf")},
        {"pool": "\ud800"},
    ],
)  # fmt: skip
def test_a_malformed_line_is_not_read(change: dict[str, Any]) -> None:
    assert Departure.parse(json.dumps(SENT | change).encode()) is None


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"null", b"[]", b"{", b"\xff", b"[" * 2000, json.dumps(SENT).encode() + b" " * LONGEST_LINE]
)
def test_text_that_is_no_line_is_not_read(line: bytes) -> None:
    assert Departure.parse(line) is None
