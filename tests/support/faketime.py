"""Processes with a wrong clock, by libfaketime; other processes keep theirs."""

from pathlib import Path


def library() -> Path | None:
    """Return the library to load into these processes, or None if it is not installed (Debian: faketime)."""
    places = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))
    return next((found for place in places for found in place.glob("**/faketime/libfaketimeMT.so.1")), None)


def wrong_by(hours: float) -> dict[str, str]:
    """Return the environment of a process whose wall clock is ahead or behind; its monotonic clock is right."""
    found = library()
    assert found is not None
    return {"LD_PRELOAD": str(found), "FAKETIME": f"{hours:+g}h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
