"""Fixtures: a bridge over a fake Slurm (tests/support/fake_slurm.py)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_slurm import World, checked_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Return the bridge's parts over a fake Slurm; at the end no client may have run twice."""
    with checked_world(tmp_path) as world:
        yield world
