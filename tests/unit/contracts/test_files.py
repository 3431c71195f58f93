"""Files are replaced as a whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from isthmus_contracts.process import files


@pytest.mark.parametrize("sync", [False, True])
def test_new_content_takes_the_place_of_the_old(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "status.json"
    for content in (b"old and longer", b"new"):
        files.replace(path, content, 0o600, sync=sync)
        assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_open_reader_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        files.replace(path, b"new")
        assert reader.read() == b"old"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, b"new", sync=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_and_the_leftover_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"untouched")
    path.symlink_to(target)
    (tmp_path / ".link.new").write_bytes(b"half")
    files.replace(path, b"new")
    assert (path.read_bytes(), path.is_symlink()) == (b"new", False)
    assert target.read_bytes() == b"untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
