"""Connections leave descriptors for the program's own files."""

import subprocess
import sys

import pytest

from isthmus_contracts.process.open_files import connections_within


@pytest.mark.parametrize(
    ("files", "wanted", "room"),
    [(1024, 2000, 768), (1024, 500, 500), (256, 500, 128), (1, 5, 1), (1 << 20, 4512, 4512)],
)
def test_room_for_connections(files: int, wanted: int, room: int) -> None:
    assert connections_within(files, wanted) == room


def test_the_soft_limit_becomes_the_hard_one() -> None:
    script = (
        "import resource as r; from isthmus_contracts.process.open_files import raise_limit\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 128)); print(raise_limit(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["128", "128", "128"]
