"""Processes whose clock is wrong, by libfaketime: nobody else's is touched."""

from pathlib import Path


def library() -> Path | None:
    """The library that is loaded into such a process; None where it is not installed (Debian: faketime)."""
    places = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))
    return next((found for place in places for found in place.glob("**/faketime/libfaketimeMT.so.1")), None)


def wrong_by(hours: float) -> dict[str, str]:
    """The environment of a process whose wall clock is ahead (or behind); its steady clock is right."""
    found = library()
    assert found is not None
    return {"LD_PRELOAD": str(found), "FAKETIME": f"{hours:+g}h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
